"""The pieces of a long text, cut and looked up by arrays.

The text is cut with NumPy, at places where the pattern surely ends a pre-token, and its pieces are looked up in an
open-addressing hash table whose keys are the bytes themselves, so that no collision can pass for a match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lmsys.data.pretokens import WIDE_SPACE


def piece_starts(data: bytes, is_ascii: bool, special: Sequence[tuple[int, int]]) -> np.ndarray:
    """Where the pieces of a UTF-8 text begin; the spans of special tokens are pieces of their own.

    Cuts as PIECE does, before whitespace that follows non-whitespace and before the last whitespace of a run, and also
    inside a word where the pattern surely ends a pre-token: between letters, digits and other characters, except after
    an apostrophe, and after whitespace other than a space. All of it only where the characters in question are ASCII.
    Most pieces are then one pre-token; none is part of one.
    """
    characters = np.frombuffer(data, np.uint8)
    space = np.ones(len(data) + 2, bool)  # with the text's two ends
    ascii_space = _IS_SPACE[characters]
    kind = _KIND[characters]
    space[1:-1] = ascii_space
    if not is_ascii:
        for match in WIDE_SPACE.finditer(data):
            space[match.start() + 1 : match.end() + 1] = True
    for start, end in special:
        space[start + 1 : end + 1] = True
        ascii_space[start:end] = False
        kind[start:end] = 0
    cut = ascii_space & ~(space[:-2] & space[2:])
    before = _KIND_BEFORE[characters[:-1]]
    cut[1:] |= (kind[1:] != before) & (kind[1:] != 0) & (before != 0)
    cut[0] = True
    if special:
        bounds = np.array(special).ravel()
        cut[bounds[bounds < len(data)]] = True
    return np.flatnonzero(cut)


# By byte. Kinds: 1 letter, 2 digit, 3 other ASCII, 4 whitespace that no pre-token begins with and goes on; 0 none.
_IS_SPACE = np.array([chr(byte) in "\t\n\v\f\r " for byte in range(256)])
_KIND = np.array(
    [0 if b > 127 or _IS_SPACE[b] else 1 if chr(b).isalpha() else 2 if chr(b).isdigit() else 3 for b in range(256)],
    np.uint8,
)
_KIND_BEFORE = np.where(_IS_SPACE, 4, _KIND).astype(np.uint8)
_KIND_BEFORE[[ord(" "), ord("'")]] = 0


class PieceTable:
    """Encodes the pieces of a text by arrays: bytes of a piece -> entry -> its ids in a pool.

    Pieces of up to 15 bytes are keys of two 64-bit numbers, the bytes and their count, in a hash table with linear
    probing; longer ones are in a dict. The table is emptied when it is full.
    """

    def __init__(
        self, dtype: Any, encode_new: Callable[[Sequence[bytes]], tuple[np.ndarray, np.ndarray]], max_entries: int
    ):
        self._dtype, self._encode_new, self._max_entries = dtype, encode_new, max_entries
        self._block = max_entries // 4  # pieces looked up at a time
        self._slots = 2 * max_entries  # a power of two, so that a hash's upper bits are its slot
        self._shift = np.uint64(64 - (self._slots - 1).bit_length())
        self._clear()

    def _clear(self) -> None:
        self._low = np.zeros(self._slots, np.uint64)
        self._high = np.zeros(self._slots, np.uint64)  # 0: a free slot, since a key holds its length here
        self._entry = np.zeros(self._slots, np.int64)
        self._long: dict[bytes, int] = {}
        self._offsets = np.zeros(0, np.int64)  # by entry: where its ids are in the pool, and how many
        self._counts = np.zeros(0, np.int64)
        self._pool = np.zeros(0, self._dtype)

    def encode(self, data: bytes, starts: np.ndarray) -> np.ndarray:
        """The ids of the pieces of data that begin at starts."""
        bounds = np.append(starts, len(data))
        words = np.ndarray(len(data) + 8, "<u8", data + bytes(16), strides=(1,))  # the eight bytes from each place on
        parts = []
        for first in range(0, len(starts), self._block):
            if len(self._offsets) + self._block > self._max_entries or len(self._pool) > 16 * self._max_entries:
                self._clear()
            entries = self._entries(data, words, bounds[first : first + self._block + 1])
            counts = self._counts[entries]
            ends = np.cumsum(counts)
            places = np.repeat(self._offsets[entries] - (ends - counts), counts) + np.arange(ends[-1])
            parts.append(self._pool[places])
        return np.concatenate(parts)

    def _entries(self, data: bytes, words: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """The entry of each piece between bounds; makes those that are new."""
        starts, lengths = bounds[:-1], np.diff(bounds)
        low = words[starts] & _LOW_BYTES[np.minimum(lengths, 8)]
        high = words[starts + 8 * (lengths > 8)] & _LOW_BYTES[np.clip(lengths - 8, 0, 7)]
        high |= lengths.astype(np.uint64) << np.uint64(56)
        entries = np.empty(len(starts), np.int64)
        is_short = lengths <= 15
        short, long = np.flatnonzero(is_short), np.flatnonzero(~is_short)
        low, high = low[short], high[short]
        slots, found = self._find(low, high)
        known = len(self._offsets)
        try:
            new = [short[place] for place in self._insert(low, high, np.flatnonzero(~found), known)]
            if new:
                slots, _ = self._find(low, high)
            entries[short] = self._entry[slots]
            new = np.concatenate(new).tolist() if new else ()
            pieces = [data[bounds[place] : bounds[place + 1]] for place in new]
            for place in long.tolist():
                piece = data[bounds[place] : bounds[place + 1]]
                entry = self._long.get(piece)
                if entry is None:
                    entry = self._long[piece] = known + len(pieces)
                    pieces.append(piece)
                entries[place] = entry
            if pieces:
                ids, counts = self._encode_new(pieces)
                self._offsets = np.append(self._offsets, len(self._pool) + np.cumsum(counts) - counts)
                self._counts = np.append(self._counts, counts)
                self._pool = np.append(self._pool, ids.astype(self._dtype))
        except BaseException:
            self._clear()  # it may know pieces that were not encoded
            raise
        return entries

    def _insert(self, low: np.ndarray, high: np.ndarray, missing: np.ndarray, entry: int) -> Iterator[np.ndarray]:
        """Put the missing keys into the table with the entries from `entry` on. Yields a place of each, in order."""
        while len(missing):
            slots, found = self._find(low[missing], high[missing])
            missing, slots = missing[~found], slots[~found]
            self._entry[slots] = missing  # several may want a free slot: the last one written gets it
            won = self._entry[slots] == missing
            place, slots, missing = missing[won], slots[won], missing[~won]
            self._low[slots], self._high[slots] = low[place], high[place]
            self._entry[slots] = entry + np.arange(len(place))
            entry += len(place)
            yield place

    def _find(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(slot, whether it holds the key) for each key; where it does not, it is the free slot that would take it."""
        slots = (((low ^ (high * _HASH_HIGH)) * _HASH_LOW) >> self._shift).astype(np.int64)
        found = (self._low[slots] == low) & (self._high[slots] == high)
        left = np.flatnonzero(~found & (self._high[slots] != 0))
        while len(left):
            slots[left] = (slots[left] + 1) % self._slots
            here = slots[left]
            hit = (self._low[here] == low[left]) & (self._high[here] == high[left])
            found[left[hit]] = True
            left = left[~hit & (self._high[here] != 0)]
        return slots, found


# Masks of the lowest 0 to 8 bytes, and odd constants of a multiplicative hash (the golden ratio's and MurmurHash3's).
_LOW_BYTES = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)
_HASH_LOW, _HASH_HIGH = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xFF51AFD7ED558CCD)
