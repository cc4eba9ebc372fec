r"""Byte-level byte-pair encoding: parallel training, encoding, decoding, files.

Source: Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units" (2016), section 3.2, over
bytes and with the pre-tokenization pattern of GPT-2 (Radford et al., 2019, section 2.2). Pairs are counted within
pre-tokens; the most frequent pair becomes a token, ties go to the lexicographically greater pair of byte strings. Encoding
merges, in each pre-token, all occurrences of the pair that was learned first, until no learned pair is left.

What makes it fast in plain Python:

- Text is first cut into *pieces*, `\s?\S+|\s+(?!\S)`, by the standard library's `re`; GPT-2's pattern, three times slower,
  sees each distinct piece once. This changes nothing: a match of GPT-2's pattern is whitespace only, or non-whitespace after
  at most one space, so a pre-token always ends where whitespace follows non-whitespace; a run of whitespace before
  non-whitespace is matched without its last character; and the lookahead, the only part of the pattern that sees beyond its
  match, finds at the end of a piece what allows the same match as in the whole text.
- A word is a `str` whose characters are token ids, so merging a pair is `str.replace`, which goes left to right as it must.
- Counts are updated only where the merged pair occurs, and the next pair comes from a heap with lazy deletion.
- Encoding remembers how pieces are encoded, in bounded caches. A short text looks its pieces up in a dict. A long one is
  cut with NumPy, at places where the pattern surely ends a pre-token, and its pieces are looked up by arrays in an
  open-addressing hash table whose keys are the bytes themselves, so that no collision can pass for a match; new pieces are
  merged all at once, a merge of each word a round.

Limits: at most 1,114,112 token ids (the range of `chr`). Memory in training grows with the number of distinct pre-tokens of
the text, not with its length. A Tokenizer is for one thread at a time; encode_file_chunks uses processes.
"""

from __future__ import annotations

import heapq
import json
import multiprocessing
import os
import re
import string
import sys
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import compress, islice, pairwise, repeat
from operator import add, is_
from pathlib import Path
from typing import Any

import numpy as np
import regex

from lmsys.config import END_OF_TEXT, require
from lmsys.records import write_json

PRETOKEN = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# What `\s` matches in PRETOKEN: Unicode's White_Space. `\s` of the standard library also matches \x1c to \x1f.
WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
_PIECE = re.compile(f"[{WHITESPACE}]?[^{WHITESPACE}]+|[{WHITESPACE}]+(?![^{WHITESPACE}])")


def _cut_pattern() -> re.Pattern[bytes]:
    """Matches in UTF-8, with no width, before ASCII whitespace that follows a character other than whitespace."""
    encoded = [character.encode() for character in WHITESPACE]
    not_after = b"".join(
        b"(?<!%s)" % b"|".join(re.escape(c) for c in encoded if len(c) == width) for width in (1, 2, 3)
    )
    return re.compile(rb"(?<=[\x00-\xff])" + not_after + rb"(?=[\t-\r ])")


_CUT = _cut_pattern()
_WIDE_SPACE = re.compile(b"|".join(character.encode() for character in WHITESPACE if not character.isascii()))

CHUNK_BYTES = 2**20  # text that one process holds at a time
_TASK_CHUNKS = 16  # chunks that a counting task goes through before it sends its counts back
_SEARCH_BYTES = 2**16  # how far a cut may lie behind its place for the sake of a special token
_MAX_PIECES = 2**18  # entries of an encoding cache, and of a counter of pieces; about 50 MiB
_MAX_CACHED_LENGTH = 64  # longer pieces are rare, and not kept
_SHORT_WORD = 128  # bytes; above, merging keeps a heap instead of searching the word for each merge
_MAX_IDS = sys.maxunicode + 1
_NEVER = sys.maxsize  # the rank of a pair that is not merged
_NEVERS = repeat(_NEVER)


_SHORT_TEXT = 8192  # characters; above, pieces are looked up by arrays
_UTF_32 = f"utf-32-{sys.byteorder[0]}e"  # with it, the characters of a word are its token ids in four bytes each
_FORMAT = "lmsys byte-level BPE 1"


# --- Training -------------------------------------------------------------------------------------


def train_bpe(
    input_path: str | os.PathLike,
    vocab_size: int,
    special_tokens: Sequence[str] = (END_OF_TEXT,),
    *,
    num_workers: int | None = None,
    progress: bool = False,
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """Learn a byte-level BPE vocabulary from a UTF-8 file.

    Args:
        input_path: the text. Line ends are kept as they are.
        vocab_size: the 256 bytes, the special tokens and the merges together; at least 257.
        special_tokens: boundaries of the text that take no part in merges, as 256, 257, ... in the vocabulary.
        num_workers: processes that count pre-tokens; None: one for each core. 1 starts none. The result is the same.
        progress: show a bar.
    Returns:
        (vocab, merges): id -> bytes, and the pairs in the order in which they were learned. Where the text runs out of
        pairs, the vocabulary is smaller than asked for, with a warning.
    Raises:
        ValueError: vocab_size too small; a missing, empty or non-UTF-8 file.
    """
    special_tokens = _check_special_tokens(special_tokens)
    least = 256 + max(1, len(special_tokens))
    require(
        least <= vocab_size <= _MAX_IDS,
        f"vocab_size is {vocab_size}; it must be at least {least}, 256 bytes and {least - 256} more, and at most {_MAX_IDS}",
    )
    counts = _count_pretokens(input_path, special_tokens, resolve_workers(num_workers), progress)
    vocab = {byte: bytes([byte]) for byte in range(256)}
    for token in special_tokens:
        if token.encode() not in vocab.values():
            vocab[len(vocab)] = token.encode()
    merges = _learn_merges(counts, vocab, vocab_size, progress)
    if len(vocab) < vocab_size:
        warnings.warn(
            f"{input_path}: every pre-token is one token after {len(merges)} merges; "
            f"the vocabulary has {len(vocab)} tokens instead of {vocab_size}",
            stacklevel=2,
        )
    return vocab, merges


def _count_pretokens(path: str | os.PathLike, special_tokens: Sequence[str], workers: int, progress: bool) -> Counter:
    """How often each pre-token occurs in the file."""
    bounds = find_chunk_boundaries(path, special_tokens=special_tokens)
    chunks = len(bounds) - 1
    tasks = -(-chunks // (workers * _TASK_CHUNKS)) * workers  # a multiple of the workers, so that they end together
    step = -(-chunks // tasks)
    spans = [bounds[i : i + step + 1] for i in range(0, chunks, step)]
    counts: Counter[str] = Counter()
    with _progress_bar(progress, bounds[-1], "counting words", unit="B", unit_scale=True) as bar:
        state = (os.fspath(path), special_tokens)
        results = map_in_order(_count_span, state, spans, min(workers, len(spans)))
        for span, counted in zip(spans, results, strict=True):
            counts.update(counted)
            bar.update(span[-1] - span[0])
    return counts


def _count_span(state: tuple[str, Sequence[str]], bounds: Sequence[int]) -> Counter:
    """Count the pre-tokens of the file's chunks between bounds, one chunk in memory at a time."""
    path, special_tokens = state
    special = _special_pattern(special_tokens)
    pieces: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    with open(path, "rb") as file:
        file.seek(bounds[0])
        for start, end in pairwise(bounds):
            text = _decode_utf8(file.read(end - start), path, start)
            for segment in special.split(text) if special else (text,):
                pieces.update(_PIECE.findall(segment))
            if len(pieces) > _MAX_PIECES or end == bounds[-1]:
                for piece, count in pieces.items():
                    for pretoken in _split_piece(piece):
                        counts[pretoken] += count
                pieces.clear()
    return counts


def _learn_merges(
    pretokens: Mapping[str, int], vocab: dict[int, bytes], vocab_size: int, progress: bool
) -> list[tuple[bytes, bytes]]:
    """Add merges to vocab until it has vocab_size tokens or no pair is left. Returns the merges."""
    words = [pretoken.encode().decode("latin-1") for pretoken in pretokens]  # characters are token ids
    frequencies = list(pretokens.values())
    counts: defaultdict[str, int] = defaultdict(int)  # pair -> how often it occurs
    places: defaultdict[str, list[int]] = defaultdict(list)  # pair -> words it occurs in, or once did
    for index, word in enumerate(words):
        frequency = frequencies[index]
        for pair in map(add, word, word[1:]):
            counts[pair] += frequency
            places[pair].append(index)

    ids = {token: index for index, token in vocab.items()}
    # For a min-heap in which the greater byte string comes first: complement the bytes, and let a prefix come last.
    descending = {chr(index): _descending(token) for index, token in vocab.items()}
    heap = [(-count, descending[pair[0]], descending[pair[1]], pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    merges: dict[tuple[bytes, bytes], None] = {}

    with _progress_bar(progress, vocab_size - len(vocab), "learning merges") as bar:
        while heap and len(vocab) < vocab_size:
            entry = heapq.heappop(heap)
            pair = entry[-1]
            count = counts.get(pair, 0)
            if count != -entry[0]:  # it has changed since; a count only falls while no entry is pushed for it
                if 0 < count < -entry[0]:
                    heapq.heappush(heap, (-count, *entry[1:]))
                continue
            left, right = pair
            merge = vocab[ord(left)], vocab[ord(right)]
            merges[merge] = None
            token = merge[0] + merge[1]
            if token not in ids:  # several pairs can make one token, which keeps its id
                ids[token] = len(vocab)
                vocab[len(vocab)] = token
                descending[chr(ids[token])] = _descending(token)
                bar.update()
            grown = _merge_pair(pair, chr(ids[token]), words, frequencies, counts, places)
            for new in grown:
                heapq.heappush(heap, (-counts[new], descending[new[0]], descending[new[1]], new))
    return list(merges)


def _merge_pair(
    pair: str,
    merged: str,
    words: list[str],
    frequencies: Sequence[int],
    counts: dict[str, int],
    places: dict[str, list[int]],
) -> set[str]:
    """Replace pair by merged in all words and update the counts around it. Returns the pairs that occur more often now."""
    left, right = pair
    grown: set[str] = set()
    for index in places.pop(pair):
        if pair not in words[index]:
            continue
        word = words[index] = words[index].replace(pair, merged)
        frequency = frequencies[index]
        last = len(word) - 1
        at = word.find(merged)
        while at >= 0:
            if at > 0:
                before = word[at - 1]
                counts[(right if before == merged else before) + left] -= frequency
                new = before + merged
                counts[new] += frequency
                places[new].append(index)
                grown.add(new)
            if at < last and (after := word[at + 1]) != merged:
                counts[right + after] -= frequency
                new = merged + after
                counts[new] += frequency
                places[new].append(index)
                grown.add(new)
            at = word.find(merged, at + 1)
    del counts[pair]
    return grown


def _descending(token: bytes) -> str:
    """A key that orders byte strings the other way round."""
    return "".join(chr(255 - byte) for byte in token) + "\u0100"


# --- Cutting files into chunks, and the processes that work on them ---------------------------------


def find_chunk_boundaries(
    path: str | os.PathLike, *, chunk_bytes: int = CHUNK_BYTES, special_tokens: Sequence[str] = ()
) -> list[int]:
    """Byte offsets that cut a UTF-8 file into chunks of about chunk_bytes whose tokens are those of the whole file.

    A cut lies at the start of a special token or, where none comes within 64 KiB, before ASCII whitespace that follows
    a character other than whitespace, where a pre-token always ends (see the top of the module). No occurrence of a
    special token lies across a cut, so no character and no special token is split. Text without such a place stays one chunk.

    Returns:
        Offsets from 0 to the file's size, strictly increasing.
    Raises:
        ValueError: the file is missing or empty.
    """
    require(chunk_bytes >= 1, f"chunk_bytes is {chunk_bytes}; it must be at least 1")
    try:
        size = os.path.getsize(path)
    except FileNotFoundError:
        raise ValueError(f"no text file at {Path(path).resolve()}") from None
    with open(path, "rb") as file:
        require(size > 0, f"{path}: the file is empty")
        special = [token.encode() for token in special_tokens]
        longest = max(map(len, special), default=0)
        pattern = _special_pattern(special_tokens, bytes)
        bounds = [0]
        target = chunk_bytes
        while target < size:
            start = max(0, target - max(longest, 3))  # 3 bytes: the longest whitespace character
            file.seek(start)
            window = file.read(target - start + _SEARCH_BYTES + longest)
            end = target - start + _SEARCH_BYTES
            cut = next(
                (
                    start + match.start()
                    for cuts in (pattern, _CUT)
                    if cuts
                    for match in cuts.finditer(window, target - start)
                    if match.start() < end and not _inside_special(window, match.start(), special)
                ),
                None,
            )
            if cut is None:
                target += _SEARCH_BYTES
            else:
                bounds.append(cut)
                target = cut + chunk_bytes
    return [*bounds, size]


def _inside_special(text, at: int, special_tokens: Sequence) -> bool:
    """Whether a special token occurs across the place `at` of a str or bytes."""
    return any(text.find(token, max(0, at - len(token) + 1), at + len(token) - 1) >= 0 for token in special_tokens)


def _decode_utf8(data: bytes, path: str | os.PathLike, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text: byte 0x{data[error.start]:02x} at offset {offset + error.start} ({error.reason})"
        ) from None


def resolve_workers(num_workers: int | None) -> int:
    """The number given, or that of the cores which this process may use. ValueError below 1."""
    if num_workers is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    require(num_workers >= 1, f"num_workers is {num_workers}; it must be at least 1")
    return num_workers


def map_in_order(function: Callable, state: Any, tasks: Iterable, workers: int) -> Iterator[Any]:
    """function(state, task) for each task, in order, in processes that get state once.

    At most two tasks a worker are under way or waiting to be taken, so memory does not grow with their number.
    function: of a module, without torch.
    """
    if workers == 1:
        yield from (function(state, task) for task in tasks)
        return
    # fork where it is at home: workers start in milliseconds, and neither a notebook nor a script without a __main__ guard
    # is imported anew, as forkserver and spawn would. It is safe beside CUDA and other threads because a worker runs only
    # functions such as this module's: no torch, no locks of others. macOS and Windows have spawn.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, _set_worker_state, (state,))
    tasks = iter(tasks)
    try:
        with warnings.catch_warnings():  # Python 3.12 warns of any fork beside threads
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
            waiting = deque(pool.submit(_call_in_worker, function, task) for task in islice(tasks, 2 * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(_call_in_worker, function, task) for task in islice(tasks, 1))
    finally:
        pool.shutdown(cancel_futures=True)


_worker_state: Any = None


def _set_worker_state(state: Any) -> None:
    global _worker_state
    _worker_state = state


def _call_in_worker(function: Callable, task: Any) -> Any:
    return function(_worker_state, task)


@contextmanager
def _progress_bar(show: bool, total: int, what: str, **options: Any):
    from tqdm import tqdm

    with tqdm(total=total, desc=what, disable=not show, **options) as bar:
        yield bar


# --- Special tokens and files -----------------------------------------------------------------------


def _check_special_tokens(special_tokens: Sequence[str] | None) -> tuple[str, ...]:
    require(
        not isinstance(special_tokens, str), f"special_tokens is the string {special_tokens!r}; give a list of strings"
    )
    special_tokens = tuple(special_tokens or ())
    for token in special_tokens:
        require(isinstance(token, str) and token != "", f"special token {token!r} is not a non-empty string")
        require(_is_encodable(token), f"special token {token!r} has a lone surrogate, which UTF-8 cannot hold")
    require(len(set(special_tokens)) == len(special_tokens), f"special_tokens {list(special_tokens)} has a token twice")
    return special_tokens


def _is_encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _special_pattern(special_tokens: Sequence[str], kind: type = str) -> re.Pattern | None:
    """Matches a special token, the longest where several begin; None where there are none."""
    if not special_tokens:
        return None
    pattern = "|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True)))
    return re.compile(pattern if kind is str else pattern.encode())


@cache
def _byte_to_printable() -> dict[int, str]:
    """GPT-2's printable character for each byte: itself where it is a visible Latin-1 character, else the next from U+0100."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


@cache
def _printable_to_byte() -> dict[str, int]:
    return {character: byte for byte, character in _byte_to_printable().items()}


def _to_printable(token: bytes) -> str:
    return "".join(map(_byte_to_printable().__getitem__, token))


def _from_printable(text: str) -> bytes:
    """Raises KeyError at a character that stands for no byte."""
    return bytes(map(_printable_to_byte().__getitem__, text))


# --- The tokenizer ----------------------------------------------------------------------------------


def _split_piece(piece: str) -> Sequence[str]:
    """PRETOKEN.findall(piece), without the pattern where a piece is an ASCII word and perhaps punctuation after it."""
    if piece.isascii():
        word = piece.rstrip(string.punctuation)
        if word[word[:1] == " " :].isalpha():
            return (word,) if len(word) == len(piece) else (word, piece[len(word) :])
    return PRETOKEN.findall(piece)


def _code_points(text: str) -> np.ndarray:
    """The characters of a text as int64."""
    return np.frombuffer(text.encode(_UTF_32, "surrogatepass"), np.uint32).astype(np.int64)


def _piece_starts(data: bytes, is_ascii: bool, special: Sequence[tuple[int, int]]) -> np.ndarray:
    """Where the pieces of a UTF-8 text begin; the spans of special tokens are pieces of their own.

    Cuts as _PIECE does, before whitespace that follows non-whitespace and before the last whitespace of a run, and also
    inside a word where the pattern surely ends a pre-token: between letters, digits and other characters, except after an
    apostrophe, and after whitespace other than a space. All of it only where the characters in question are ASCII. Most
    pieces are then one pre-token; none is part of one.
    """
    characters = np.frombuffer(data, np.uint8)
    space = np.ones(len(data) + 2, bool)  # with the text's two ends
    ascii_space = _IS_SPACE[characters]
    kind = _KIND[characters]
    space[1:-1] = ascii_space
    if not is_ascii:
        for match in _WIDE_SPACE.finditer(data):
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


# By byte. Kinds: 1 letter, 2 digit, 3 other ASCII, 4 whitespace that no pre-token begins with and goes on; 0 no cut here.
_IS_SPACE = np.array([chr(byte) in "\t\n\v\f\r " for byte in range(256)])
_KIND = np.array(
    [0 if b > 127 or _IS_SPACE[b] else 1 if chr(b).isalpha() else 2 if chr(b).isdigit() else 3 for b in range(256)],
    np.uint8,
)
_KIND_BEFORE = np.where(_IS_SPACE, 4, _KIND).astype(np.uint8)
_KIND_BEFORE[[ord(" "), ord("'")]] = 0


class _PieceTable:
    """Encodes the pieces of a text by arrays: bytes of a piece -> entry -> its ids in a pool.

    Pieces of up to 15 bytes are keys of two 64-bit numbers, the bytes and their count, in a hash table with linear probing;
    longer ones are in a dict. The table is emptied when it is full.
    """

    def __init__(
        self, dtype: Any, encode_new: Callable[[Sequence[bytes]], tuple[np.ndarray, np.ndarray]], max_entries: int
    ):
        self._dtype = dtype
        self._encode_new = encode_new
        self._max_entries = max_entries
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
            pieces = [
                data[bounds[place] : bounds[place + 1]] for place in (np.concatenate(new).tolist() if new else ())
            ]
            for place in long.tolist():
                piece = data[bounds[place] : bounds[place + 1]]
                entry = self._long.get(piece)
                if entry is None:
                    entry = self._long[piece] = known + len(pieces)
                    pieces.append(piece)
                entries[place] = entry
            if pieces:
                self._append(pieces)
        except BaseException:
            self._clear()  # it may know pieces that were not encoded
            raise
        return entries

    def _insert(self, low: np.ndarray, high: np.ndarray, missing: np.ndarray, entry: int) -> Iterator[np.ndarray]:
        """Put the missing keys into the table with the entries from `entry` on. Yields a place of each, in their order."""
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

    def _append(self, pieces: Sequence[bytes]) -> None:
        """Encode new pieces and add them to the pool."""
        ids, counts = self._encode_new(pieces)
        self._offsets = np.append(self._offsets, len(self._pool) + np.cumsum(counts) - counts)
        self._counts = np.append(self._counts, counts)
        self._pool = np.append(self._pool, ids.astype(self._pool.dtype))

    def _find(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(slot, whether it holds the key) for each key; where it does not, the slot is the free one that would take it."""
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


class Tokenizer:
    """Encodes text to token ids and decodes them.

    Args:
        vocab: id -> bytes, with all 256 single bytes, no bytes twice, ids from 0 up (gaps are allowed).
        merges: pairs of tokens in the order in which they were learned; their concatenations are tokens.
        special_tokens: strings that are one token each wherever they occur, the longest first where several begin.
            Those that vocab lacks are appended to it.
    Raises:
        ValueError: the parts do not fit together.
    """

    def __init__(
        self,
        vocab: Mapping[int, bytes],
        merges: Sequence[tuple[bytes, bytes]],
        special_tokens: Sequence[str] | None = None,
    ):
        self.special_tokens = _check_special_tokens(special_tokens)
        self.vocab: dict[int, bytes] = dict(vocab)
        for index, token in self.vocab.items():
            if not (isinstance(index, int) and 0 <= index < _MAX_IDS and isinstance(token, bytes) and token):
                raise ValueError(
                    f"vocabulary entry {index!r}: {token!r} is not an id from 0 to {_MAX_IDS - 1} with its bytes"
                )
        self._ids: dict[bytes, int] = {token: index for index, token in self.vocab.items()}
        if len(self._ids) < len(self.vocab):
            index, token = next((i, t) for i, t in self.vocab.items() if self._ids[t] != i)
            raise ValueError(f"the vocabulary has the bytes {token!r} twice, as ids {index} and {self._ids[token]}")
        missing = [byte for byte in range(256) if bytes([byte]) not in self._ids]
        require(
            not missing, f"the vocabulary lacks {len(missing)} of the 256 single bytes, first {bytes(missing[:1])!r}"
        )
        for token in self.special_tokens:
            if token.encode() not in self._ids:
                index = max(self.vocab) + 1
                self.vocab[index] = token.encode()
                self._ids[token.encode()] = index

        # A word in the making is a str whose characters are token ids.
        self.merges: list[tuple[bytes, bytes]] = [(left, right) for left, right in merges]
        self._ranks: dict[str, int] = {}  # pair -> when it was learned
        self._replacements: list[tuple[str, str]] = []  # rank -> (pair, what it becomes)
        for rank, (left, right) in enumerate(self.merges):
            for token in (left, right, left + right):
                if token not in self._ids:
                    raise ValueError(f"merge {rank}, {left!r} and {right!r}: the vocabulary lacks {token!r}")
            pair = chr(self._ids[left]) + chr(self._ids[right])
            self._ranks.setdefault(pair, rank)
            self._replacements.append((pair, chr(self._ids[left + right])))
        pairs = _code_points("".join(self._ranks)).reshape(-1, 2)
        keys = pairs[:, 0] * _MAX_IDS + pairs[:, 1]
        order = np.argsort(keys)
        self._pair_keys = np.append(keys[order], _NEVER)  # the same for arrays; the last entry is no pair
        self._key_ranks = np.append(np.fromiter(self._ranks.values(), np.int64, len(keys))[order], _NEVER)
        self._merged_ids = _code_points("".join(merged for _, merged in self._replacements))
        self._byte_ids = np.array([self._ids[bytes([byte])] for byte in range(256)])
        self._byte_symbols = {byte: chr(self._ids[bytes([byte])]) for byte in range(256)}

        self.vocab_size: int = max(self.vocab) + 1  # the highest id + 1
        self.token_dtype = np.uint16 if self.vocab_size <= 65_536 else np.uint32  # the smallest that holds all ids
        # UTF-16 and UTF-32 are the ids themselves, in two or four bytes: below 65,536 UTF-16 takes one unit a character.
        self._packing = f"utf-{np.dtype(self.token_dtype).itemsize * 8}-{sys.byteorder[0]}e"
        self._special = _special_pattern(self.special_tokens)
        self._special_bytes = _special_pattern(self.special_tokens, bytes)
        self._longest_special = max(map(len, self.special_tokens), default=0)
        # Caches of packed ids: for pre-tokens, for the pieces of short texts, and for those of long ones.
        self._pretokens: dict[str, bytes] = {}
        self._special_pieces = {token: self._pack(chr(self.token_id(token))) for token in self.special_tokens}
        self._pieces: dict[str, bytes] = dict(self._special_pieces)  # no other piece is a special token
        self._table = _PieceTable(self.token_dtype, self._encode_new, _MAX_PIECES)

    def __reduce__(self):
        return Tokenizer, (self.vocab, self.merges, self.special_tokens)

    def __repr__(self) -> str:
        return (
            f"Tokenizer(vocab_size={self.vocab_size}, merges={len(self.merges)}, special_tokens={self.special_tokens})"
        )

    @classmethod
    def train(
        cls,
        path: str | os.PathLike,
        vocab_size: int,
        special_tokens: Sequence[str] = (END_OF_TEXT,),
        *,
        num_workers: int | None = None,
        progress: bool = False,
    ) -> Tokenizer:
        """A tokenizer trained on a UTF-8 file; see train_bpe."""
        vocab, merges = train_bpe(path, vocab_size, special_tokens, num_workers=num_workers, progress=progress)
        return cls(vocab, merges, special_tokens)

    def token_id(self, token: str) -> int:
        """The id of a token given as text. ValueError where it is not one token."""
        index = self._ids.get(token.encode("utf-8", "surrogatepass"))
        require(index is not None, f"{token!r} is not a token of this vocabulary of {len(self.vocab)}")
        return index

    # Encoding

    def encode(self, text: str) -> list[int]:
        """The token ids of a text. ValueError where it has a lone surrogate, which is no Unicode text."""
        return self.encode_to_array(text).tolist()

    def encode_to_array(self, text: str, dtype: Any = None) -> np.ndarray:
        """The token ids of a text as a one-dimensional array of token_dtype, or of dtype where it holds them all."""
        dtype = np.dtype(self.token_dtype if dtype is None else dtype)
        require(
            dtype.kind in "iu" and np.iinfo(dtype).max >= self.vocab_size - 1,
            f"dtype {dtype} cannot hold the ids of a vocabulary of {self.vocab_size}; take {np.dtype(self.token_dtype)}",
        )
        try:
            if len(text) > _SHORT_TEXT:
                return self._encode_long(text).astype(dtype, copy=False)
            return np.frombuffer(self._encode_short(text), self.token_dtype).astype(dtype, copy=False)
        except UnicodeEncodeError:
            at, character = next((i, c) for i, c in enumerate(text) if not _is_encodable(c))
            raise ValueError(
                f"the text has a lone surrogate, U+{ord(character):04X} at character {at}, which UTF-8 cannot hold"
            ) from None

    def encode_iterable(self, iterable: Iterable[str]) -> Iterator[int]:
        """The ids of encode("".join(iterable)), as the pieces come and in bounded memory.

        What has come is encoded up to the last place where a pre-token surely ends: before a space or line feed after
        a character other than whitespace. Only text without such a place is held until it comes.
        """
        text = ""
        for part in iterable:
            scanned = max(1, len(text) - self._longest_special)
            text += part
            if cut := self._last_cut(text, scanned):
                yield from self.encode(text[:cut])
                text = text[cut:]
        yield from self.encode(text)

    def encode_file_chunks(
        self, path: str | os.PathLike, *, num_workers: int | None = None, chunk_bytes: int = CHUNK_BYTES
    ) -> Iterator[tuple[np.ndarray, int]]:
        """The ids of a UTF-8 file in order, chunk by chunk, encoded in processes and in bounded memory.

        Args:
            num_workers: processes; None: one for each core. 1 starts none.
            chunk_bytes: text in a chunk; the ids do not depend on it.
        Yields:
            (ids of token_dtype, bytes of the file that they stand for).
        Raises:
            ValueError: a missing, empty or non-UTF-8 file, before the chunk in question.
        """
        workers = resolve_workers(num_workers)
        bounds = find_chunk_boundaries(path, chunk_bytes=chunk_bytes, special_tokens=self.special_tokens)
        state = (self, os.fspath(path))
        yield from map_in_order(_encode_chunk, state, pairwise(bounds), min(workers, len(bounds) - 1))

    def _encode_short(self, text: str) -> bytearray:
        """The packed ids of a text, by a dict."""
        pieces: list[str] = []
        start = 0
        for match in self._special.finditer(text) if self._special else ():
            pieces += _PIECE.findall(text, start, match.start())
            pieces.append(match.group())
            start = match.end()
        pieces += _PIECE.findall(text, start)
        packed = list(map(self._pieces.get, pieces))
        if None in packed:
            new = {piece: self._encode_piece(piece) for piece in set(compress(pieces, map(is_, packed, repeat(None))))}
            packed = [new[piece] if ids is None else ids for piece, ids in zip(pieces, packed, strict=True)]
            _keep(self._pieces, new, self._special_pieces)
        return bytearray().join(packed)  # writable, as an array from it should be

    def _encode_long(self, text: str) -> np.ndarray:
        """The ids of a text, by arrays: for a text of more than some thousand characters, several times faster."""
        data = text.encode()
        special = [match.span() for match in self._special_bytes.finditer(data)] if self._special_bytes else []
        starts = _piece_starts(data, text.isascii(), special)
        return self._table.encode(data, starts)

    def _encode_piece(self, piece: str) -> bytes:
        """The packed ids of a piece that is no special token."""
        known = self._pretokens
        packed = []
        for pretoken in _split_piece(piece):
            ids = known.get(pretoken)
            if ids is None:
                ids = self._pack(self._merge(self._symbols(pretoken)))
                _keep(known, {pretoken: ids})
            packed.append(ids)
        return b"".join(packed)

    def _encode_new(self, pieces: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(the ids of all pieces, one piece after the other, how many each has); a piece may be a special token."""
        symbols = self._byte_ids[np.frombuffer(b"".join(pieces), np.uint8)]
        special = {token.encode() for token in self.special_tokens}
        lengths: list[int] = []  # of words, in bytes
        words_of = np.ones(len(pieces), np.int64)  # how many words a piece is
        ready: dict[int, np.ndarray] = {}  # word -> its ids, where it is not for merging many at once
        for index, piece in enumerate(pieces):
            if piece in special:
                ready[len(lengths)] = np.array([self._ids[piece]])
                lengths.append(len(piece))
            elif piece[piece[:1] == b" " :].isalpha() and len(piece) <= _SHORT_WORD:  # ASCII letters: one pre-token
                lengths.append(len(piece))
            else:
                pretokens = _split_piece(piece.decode())
                words_of[index] = len(pretokens)
                for pretoken in pretokens:
                    word = self._symbols(pretoken)
                    if len(word) > _SHORT_WORD:
                        ready[len(lengths)] = _code_points(self._merge(word))
                    lengths.append(len(word))
        lengths = np.array(lengths)
        if ready:
            ends = np.cumsum(lengths)
            parts, at = [], 0
            for word, ids in ready.items():
                parts += [symbols[at : ends[word] - lengths[word]], ids]
                at, lengths[word] = ends[word], len(ids)
            symbols = np.concatenate([*parts, symbols[at:]])
        symbols, counts = self._merge_many(symbols, lengths)
        return symbols, np.add.reduceat(counts, np.cumsum(words_of) - words_of)

    def _merge_many(self, symbols: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As _merge, for many words at once: in each round, each word's pair that was learned first.

        Takes the ids of the words' bytes, one word after the other, and how many each has; returns their tokens likewise.
        """
        word = np.repeat(np.arange(len(lengths)), lengths)
        ranks = self._pair_ranks(symbols, word, np.arange(len(symbols)))
        finished: list[tuple[np.ndarray, np.ndarray]] = []
        while len(symbols):
            first = np.flatnonzero(np.diff(word, prepend=-1))
            best = np.repeat(np.minimum.reduceat(ranks, first), np.diff(first, append=len(word)))
            done = best == _NEVER
            finished.append((word[done], symbols[done]))
            at = np.flatnonzero((ranks == best) & ~done)
            # In a run of overlapping places, such as aaaa for the pair aa, every second one merges.
            index = np.arange(len(at))
            run = np.maximum.accumulate(np.where(np.diff(at, prepend=-2) != 1, index, 0))
            at = at[(index - run) % 2 == 0]
            symbols[at] = self._merged_ids[ranks[at]]
            keep = ~done
            keep[at + 1] = False
            changed = (np.cumsum(keep) - 1)[at]
            symbols, word, ranks = symbols[keep], word[keep], ranks[keep]
            changed = np.concatenate([changed, changed[changed > 0] - 1])
            ranks[changed] = self._pair_ranks(symbols, word, changed)
        word = np.concatenate([word for word, _ in finished])
        symbols = np.concatenate([symbols for _, symbols in finished])[np.argsort(word, kind="stable")]
        return symbols, np.bincount(word)

    def _pair_ranks(self, symbols: np.ndarray, word: np.ndarray, at: np.ndarray) -> np.ndarray:
        """The ranks of the pairs that begin at the places `at`; _NEVER at the end of a word."""
        after = np.minimum(at + 1, len(symbols) - 1)
        keys = symbols[at] * _MAX_IDS + symbols[after]
        found = np.searchsorted(self._pair_keys, keys)
        is_pair = (self._pair_keys[found] == keys) & (word[at] == word[after]) & (at != after)
        return np.where(is_pair, self._key_ranks[found], _NEVER)

    def _pack(self, word: str) -> bytes:
        return word.encode(self._packing, "surrogatepass")

    def _symbols(self, pretoken: str) -> str:
        """The bytes of a pre-token as a word: a str whose characters are token ids."""
        return pretoken.encode().decode("latin-1").translate(self._byte_symbols)

    def _merge(self, word: str) -> str:
        """Merge the pair that was learned first, at all its places, until none is left."""
        if len(word) > _SHORT_WORD:
            return self._merge_long(word)
        rank_of = self._ranks.get
        while len(word) > 1 and (rank := min(map(rank_of, map(add, word, word[1:]), _NEVERS))) != _NEVER:
            word = word.replace(*self._replacements[rank])
        return word

    def _merge_long(self, word: str) -> str:
        """As _merge, in n log n for a word of n bytes: a linked list of symbols, and the places of each rank's pair."""
        symbols: list[str] = list(word)
        after = [*range(1, len(word)), -1]
        before = list(range(-1, len(word) - 1))
        places: dict[int, list[int]] = {}
        heap: list[int] = []  # ranks that have places

        def note(place: int) -> None:
            rank = self._ranks.get(symbols[place] + symbols[after[place]])
            if rank is not None:
                if rank not in places:
                    places[rank] = []
                    heapq.heappush(heap, rank)
                places[rank].append(place)

        for place in range(len(word) - 1):
            note(place)
        while heap:
            rank = heapq.heappop(heap)
            pair, merged = self._replacements[rank]
            made = []
            for place in sorted(places.pop(rank)):
                right = after[place]
                if right >= 0 and symbols[place] + symbols[right] == pair:  # it may have gone since it was noted
                    symbols[place], symbols[right] = merged, ""
                    after[place] = after[right]
                    if after[place] >= 0:
                        before[after[place]] = place
                    made.append(place)
            for place in made:
                if before[place] >= 0:
                    note(before[place])
                if after[place] >= 0:
                    note(place)
        return "".join(symbols)

    def _last_cut(self, text: str, start: int) -> int:
        """The last place, from start on, where text can be cut whatever follows it; 0 if there is none."""
        end = len(text) - max(self._longest_special - 1, 0)  # beyond, a special token may have begun
        while (end := max(text.rfind(" ", start, end + 1), text.rfind("\n", start, end + 1))) >= start:
            if not text[end - 1].isspace() and not _inside_special(text, end, self.special_tokens):
                return end
            end -= 1
        return 0

    # Decoding

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD. ValueError at an id outside the vocabulary."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        try:
            return b"".join(map(self.vocab.__getitem__, ids)).decode("utf-8", errors="replace")
        except KeyError as error:
            raise ValueError(
                f"token id {error.args[0]} is not in the vocabulary, whose ids go from 0 to {self.vocab_size - 1}"
            ) from None

    # Files

    def save(self, path: str | os.PathLike) -> Path:
        """Write vocabulary, merges and special tokens to a JSON file, bytes in GPT-2's printable characters; atomic."""
        return write_json(
            path,
            {
                "format": _FORMAT,
                "special_tokens": list(self.special_tokens),
                "vocab": {_to_printable(token): index for index, token in self.vocab.items()},
                "merges": [f"{_to_printable(left)} {_to_printable(right)}" for left, right in self.merges],
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """A tokenizer that save() wrote. ValueError, naming the file, where it is missing, damaged or something else."""
        value = _read_json(path)
        require(
            isinstance(value, dict) and value.get("format") == _FORMAT,
            f"{path}: not a tokenizer saved by this package (its JSON has no 'format': '{_FORMAT}')",
        )
        with _damage_named(path):
            vocab = {index: _from_printable(token) for token, index in value["vocab"].items()}
            require(len(vocab) == len(value["vocab"]), "two tokens have the same id")
            merges = [_merge_from_line(line) for line in value["merges"]]
            return cls(vocab, merges, value["special_tokens"])

    @classmethod
    def from_files(
        cls,
        vocab_path: str | os.PathLike,
        merges_path: str | os.PathLike,
        special_tokens: Sequence[str] | None = (END_OF_TEXT,),
    ) -> Tokenizer:
        """A tokenizer from GPT-2's files: a JSON object of printable token -> id, and a merge a line.

        Raises:
            ValueError: names the file that is missing or damaged.
        """
        special_tokens = _check_special_tokens(special_tokens)
        vocab: dict[int, bytes] = {}
        with _damage_named(vocab_path):
            for token, index in _read_json(vocab_path).items():
                vocab[index] = token.encode() if token in special_tokens else _from_printable(token)
        with _damage_named(merges_path):
            lines = _read_text(merges_path).split("\n")
            if lines[0].startswith("#version"):
                del lines[0]
            merges = [_merge_from_line(line) for line in lines if line.strip()]
        with _damage_named(f"{vocab_path} and {merges_path}"):
            return cls(vocab, merges, special_tokens)

    from_gpt2 = from_files

    def export_huggingface(self, path: str | os.PathLike) -> Path:
        """Write a tokenizer.json that Hugging Face `tokenizers` loads and that gives the same ids; atomic.

        Raises:
            ValueError: a special token reads like the printable form of another token, which that format cannot tell apart.
        """
        special = {self.token_id(token): token for token in self.special_tokens}
        names = {index: special.get(index) or _to_printable(token) for index, token in self.vocab.items()}
        vocab = {name: index for index, name in names.items()}
        for index, name in special.items():
            same = next(i for i, other in names.items() if other == name and (i != index or vocab[name] == index))
            require(
                same == index,
                f"special token {name!r} cannot be exported: tokenizer.json would take it for token {same}, {self.vocab[same]!r}",
            )
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        return write_json(
            path,
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [{"id": index, "content": name, **flags} for index, name in sorted(special.items())],
                "normalizer": None,
                "pre_tokenizer": byte_level,
                "post_processor": None,
                "decoder": byte_level,
                "model": {
                    "type": "BPE",
                    "dropout": None,
                    "unk_token": None,
                    "continuing_subword_prefix": None,
                    "end_of_word_suffix": None,
                    "fuse_unk": False,
                    "byte_fallback": False,
                    "ignore_merges": False,
                    "vocab": vocab,
                    "merges": [[_to_printable(left), _to_printable(right)] for left, right in self.merges],
                },
            },
        )

    @classmethod
    def from_huggingface(cls, path: str | os.PathLike) -> Tokenizer:
        """A tokenizer from a Hugging Face tokenizer.json, which gives the same ids.

        Raises:
            ValueError: the file is missing or damaged, or anything but byte-level BPE with GPT-2's pattern: names what it has.
        """

        def only(what: str, found: Any, *allowed: Any) -> None:
            require(
                any(type(found) is type(one) and found == one for one in allowed),
                f"{path}: {what} is {json.dumps(found)[:80]}, which is not supported: only "
                f"{' or '.join(map(json.dumps, allowed))} is, as in byte-level BPE with GPT-2's pattern",
            )

        value = _read_json(path)
        with _damage_named(path):
            model, before, after = value["model"], value["pre_tokenizer"] or {}, value.get("post_processor") or {}
            only("the model's type", model.get("type"), "BPE")
            for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
                only(f"the model's {name}", model.get(name), None, "", 0.0)
            for name in ("byte_fallback", "ignore_merges"):
                only(f"the model's {name}", model.get(name), None, False)
            only("the normalizer", value.get("normalizer"), None)
            only("the pre-tokenizer's type", before.get("type"), "ByteLevel")
            only("the pre-tokenizer's add_prefix_space", before.get("add_prefix_space"), False)
            only("the pre-tokenizer's use_regex", before.get("use_regex", True), True)
            only("the post-processor's type", after.get("type"), None, "ByteLevel")
            special = {}
            for token in value.get("added_tokens") or ():
                for name in ("single_word", "lstrip", "rstrip"):
                    only(f"{name} of token {token['content']!r}", token.get(name), None, False)
                special[token["content"]] = token["id"]
            names = model["vocab"] | special
            vocab = {
                index: name.encode() if name in special else _from_printable(name) for name, index in names.items()
            }
            require(len(vocab) == len(names), "two tokens have the same id")
            merges = [
                _merge_from_line(one) if isinstance(one, str) else tuple(map(_from_printable, one))
                for one in model["merges"]
            ]
            return cls(vocab, merges, list(special))


def _keep(known: dict[str, bytes], new: Mapping[str, bytes], always: Mapping[str, bytes] | None = None) -> None:
    """Add new entries to a cache, without the long ones. A cache that would pass _MAX_PIECES is emptied, but for `always`."""
    if len(known) + len(new) > _MAX_PIECES:
        known.clear()
        known.update(always or {})
    known.update(islice(((key, ids) for key, ids in new.items() if len(key) <= _MAX_CACHED_LENGTH), _MAX_PIECES))


def _encode_chunk(state: tuple[Tokenizer, str], bounds: tuple[int, int]) -> tuple[np.ndarray, int]:
    tokenizer, path = state
    start, end = bounds
    with open(path, "rb") as file:
        file.seek(start)
        text = _decode_utf8(file.read(end - start), path, start)
    return tokenizer.encode_to_array(text), end - start


def _merge_from_line(line: str) -> tuple[bytes, bytes]:
    left, right = line.split(" ")
    return _from_printable(left), _from_printable(right)


def _read_text(path: str | os.PathLike) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ValueError(f"no tokenizer file at {Path(path).resolve()}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at offset {error.start}") from None


def _read_json(path: str | os.PathLike) -> Any:
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None


@contextmanager
def _damage_named(path: str | os.PathLike):
    """Errors from content of an unexpected shape become a ValueError that names the file."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if str(path) in str(error):
            raise
        what = f"lacks or does not know {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: not a whole tokenizer file: {what}") from None
