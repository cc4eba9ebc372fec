"""The tokenizer: encoding and decoding by a byte-level byte-pair encoding, and its files.

The pre-tokenization pattern is GPT-2's (Radford et al., 2019, section 2.2). Encoding merges, in each pre-token, all
occurrences of the pair that was learned first, until no learned pair is left (Sennrich, Haddow and Birch, 2016);
lmsys.data.bpe learns the pairs. How pieces are encoded is remembered in bounded caches: a short text looks its pieces
up in a dict, a long one by arrays (lmsys.data.pieces), and new pieces are merged all at once, a merge a word and round.

Limits: at most 1,114,112 token ids. A Tokenizer is for one thread at a time; encode_file_chunks uses processes.
"""

from __future__ import annotations

import heapq
import json
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lmsys.config import END_OF_TEXT, require
from lmsys.data.bpe import train_bpe
from lmsys.data.pieces import PieceTable, piece_starts
from lmsys.data.pretokens import (
    CHUNK_BYTES,
    MAX_IDS,
    MAX_PIECES,
    PIECE,
    check_special_tokens,
    decode_utf8,
    find_chunk_boundaries,
    inside_special,
    is_encodable,
    special_pattern,
    split_piece,
)
from lmsys.data.workers import map_in_order, resolve_workers
from lmsys.records import write_json

SHORT_TEXT = 8192  # characters; above, pieces are looked up by arrays
_MAX_CACHED_LENGTH = 64  # longer pieces are rare, and not kept
_SHORT_WORD = 128  # bytes; longer words are merged one by one, with a heap
_NEVER = sys.maxsize  # the rank of a pair that is not merged
_FORMAT = "lmsys byte-level BPE 1"
# Of a Hugging Face BPE model: what must be absent, and what must be off.
_HF_MODEL_NULL = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
_HF_MODEL_FALSE = ("byte_fallback", "ignore_merges")

# GPT-2's printable character for each byte: itself where it is a visible Latin-1 character, else the next from U+0100.
_VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_PRINTABLE = {byte: chr(byte) for byte in _VISIBLE} | {byte: chr(256 + n) for n, byte in enumerate(_HIDDEN)}
_BYTES = {character: byte for byte, character in _PRINTABLE.items()}


def _to_printable(token: bytes) -> str:
    return token.decode("latin-1").translate(_PRINTABLE)


def _from_printable(text: str) -> bytes:
    """Raises KeyError at a character that stands for no byte."""
    return bytes(map(_BYTES.__getitem__, text))


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

    def __init__(self, vocab: Mapping[int, bytes], merges: Sequence[tuple[bytes, bytes]], special_tokens=None):
        self.special_tokens = check_special_tokens(special_tokens)
        self.vocab: dict[int, bytes] = dict(vocab)
        self._ids: dict[bytes, int] = {}
        for index, token in self.vocab.items():
            fits = isinstance(index, int) and 0 <= index < MAX_IDS and isinstance(token, bytes) and token
            entry = f"vocabulary entry {index!r}: {token!r}"
            require(fits, f"{entry} is not an id from 0 to {MAX_IDS - 1} with its bytes")
            other = self._ids.setdefault(token, index)
            require(other == index, f"the vocabulary has the bytes {token!r} twice, as ids {other} and {index}")
        missing = bytes(byte for byte in range(256) if bytes([byte]) not in self._ids)
        require(not missing, f"the vocabulary lacks {len(missing)} of the 256 single bytes, first {missing[:1]!r}")
        for token in map(str.encode, self.special_tokens):
            if token not in self._ids:
                self._ids[token] = max(self.vocab) + 1
                self.vocab[self._ids[token]] = token

        self.merges: list[tuple[bytes, bytes]] = [(left, right) for left, right in merges]
        self._ranks: dict[int, int] = {}  # key of a pair, left id * MAX_IDS + right id -> when it was learned
        for rank, (left, right) in enumerate(self.merges):
            for token in (left, right, left + right):
                require(token in self._ids, f"merge {rank}, {left!r} and {right!r}: the vocabulary lacks {token!r}")
            self._ranks.setdefault(self._ids[left] * MAX_IDS + self._ids[right], rank)
        # The same for arrays, sorted by key; the last entry is no pair.
        keys = sorted(self._ranks)
        self._pair_keys = np.array([*keys, _NEVER])
        self._key_ranks = np.array([*map(self._ranks.get, keys), _NEVER])
        self._merged_ids = np.array([self._ids[left + right] for left, right in self.merges], np.int64)
        self._byte_ids = np.array([self._ids[bytes([byte])] for byte in range(256)])

        self.vocab_size: int = max(self.vocab) + 1  # the highest id + 1
        self.token_dtype = np.uint16 if self.vocab_size <= 65_536 else np.uint32  # the smallest that holds all ids
        self._typecode = np.dtype(self.token_dtype).char
        self._special = special_pattern(self.special_tokens)
        self._special_bytes = special_pattern(self.special_tokens, bytes)
        self._longest_special = max(map(len, self.special_tokens), default=0)
        self._pieces: dict[str, bytes] = {}  # the pieces of short texts -> their ids as an array's bytes
        self._table = PieceTable(self.token_dtype, self._encode_new, MAX_PIECES)  # and those of long ones

    def __reduce__(self):
        return Tokenizer, (self.vocab, self.merges, self.special_tokens)

    def __repr__(self) -> str:
        sizes = f"vocab_size={self.vocab_size}, merges={len(self.merges)}"
        return f"Tokenizer({sizes}, special_tokens={self.special_tokens})"

    @classmethod
    def train(
        cls, path: str | Path, vocab_size: int, special_tokens: Sequence[str] = (END_OF_TEXT,), **options: Any
    ) -> Tokenizer:
        """A tokenizer trained on a UTF-8 file; see train_bpe, whose options are num_workers and progress."""
        return cls(*train_bpe(path, vocab_size, special_tokens, **options), special_tokens)

    def token_id(self, token: str) -> int:
        """The id of a token given as text. ValueError where it is not one token."""
        index = self._ids.get(token.encode("utf-8", "surrogatepass"))
        require(index is not None, f"{token!r} is not a token of this vocabulary of {len(self.vocab)}")
        return index

    # Encoding

    def encode(self, text: str) -> list[int]:
        """The token ids of a text. ValueError where it has a lone surrogate, which is no Unicode text."""
        return self.encode_to_array(text).tolist()

    def encode_to_array(self, text: str) -> np.ndarray:
        """The token ids of a text as a one-dimensional array of token_dtype."""
        try:
            return self._encode_long(text) if len(text) > SHORT_TEXT else self._encode_short(text)
        except UnicodeEncodeError:
            at, character = next((i, c) for i, c in enumerate(text) if not is_encodable(c))
            what = f"a lone surrogate, U+{ord(character):04X} at character {at}"
            raise ValueError(f"the text has {what}, which UTF-8 cannot hold") from None

    def encode_iterable(self, iterable: Iterable[str]) -> Iterator[int]:
        """The ids of encode("".join(iterable)), as the pieces come.

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
        self, path: str | Path, *, num_workers: int | None = None, chunk_bytes: int = CHUNK_BYTES
    ) -> Iterator[tuple[np.ndarray, int]]:
        """The ids of a UTF-8 file in order, chunk by chunk, encoded in processes and in bounded memory.

        Yields (ids of token_dtype, bytes of the file that they stand for). ValueError: a missing, empty or non-UTF-8
        file. num_workers: None: a process for each core. 1 starts none.
        """
        workers = resolve_workers(num_workers)
        bounds = find_chunk_boundaries(path, chunk_bytes=chunk_bytes, special_tokens=self.special_tokens)
        yield from map_in_order(_encode_chunk, (self, path), pairwise(bounds), min(workers, len(bounds) - 1))

    def _encode_short(self, text: str) -> np.ndarray:
        """The ids of a text, by a dict."""
        pieces: list[str] = []
        start = 0
        for match in self._special.finditer(text) if self._special else ():
            pieces += PIECE.findall(text, start, match.start())
            pieces.append(match.group())
            start = match.end()
        pieces += PIECE.findall(text, start)
        known = list(map(self._pieces.get, pieces))
        if None in known:
            missing = {piece for piece, ids in zip(pieces, known, strict=True) if ids is None}
            new = {piece: self._encode_piece(piece) for piece in missing}
            known = [new[piece] if ids is None else ids for piece, ids in zip(pieces, known, strict=True)]
            kept = {piece: ids for piece, ids in new.items() if len(piece) <= _MAX_CACHED_LENGTH}
            if len(self._pieces) + len(kept) > MAX_PIECES:
                self._pieces.clear()
            self._pieces.update(islice(kept.items(), MAX_PIECES))
        return np.frombuffer(bytearray().join(known), self.token_dtype)  # a bytearray, so that it is writable

    def _encode_piece(self, piece: str) -> bytes:
        if piece in self.special_tokens:  # no other piece is one
            ids = [self.token_id(piece)]
        else:
            ids = [index for word in split_piece(piece) for index in self._merge(word.encode())]
        return array(self._typecode, ids).tobytes()

    def _encode_long(self, text: str) -> np.ndarray:
        """The ids of a text, by arrays: several times faster for more than some thousand characters."""
        data = text.encode()
        special = [match.span() for match in self._special_bytes.finditer(data)] if self._special_bytes else []
        return self._table.encode(data, piece_starts(data, text.isascii(), special))

    def _encode_new(self, pieces: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(the ids of all pieces, one piece after the other; how many each has). A piece may be a special token."""
        special = {token.encode() for token in self.special_tokens}
        lengths: list[int] = []  # of words, in bytes
        words_of = np.ones(len(pieces), np.int64)  # how many words a piece is
        ready: dict[int, list[int]] = {}  # word -> its ids, where it is not for merging many at once
        for index, piece in enumerate(pieces):
            if piece in special:
                ready[len(lengths)] = [self._ids[piece]]
                lengths.append(len(piece))
            elif piece[piece[:1] == b" " :].isalpha() and len(piece) <= _SHORT_WORD:  # ASCII letters: one pre-token
                lengths.append(len(piece))
            else:
                words = [pretoken.encode() for pretoken in split_piece(piece.decode())]
                words_of[index] = len(words)
                for word in words:
                    if len(word) > _SHORT_WORD:
                        ready[len(lengths)] = self._merge(word)
                    lengths.append(len(word))
        symbols = self._byte_ids[np.frombuffer(b"".join(pieces), np.uint8)]
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
        """Merge many words at once: in each round, each word's pair that was learned first, at all its places.

        Takes the ids of the words' bytes, word after word, and how many each has; returns them likewise.
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
        keys = symbols[at] * MAX_IDS + symbols[after]
        found = np.searchsorted(self._pair_keys, keys)
        is_pair = (self._pair_keys[found] == keys) & (word[at] == word[after]) & (at != after)
        return np.where(is_pair, self._key_ranks[found], _NEVER)

    def _merge(self, word: bytes) -> list[int]:
        """As _merge_many for one word, in n log n for n bytes: a linked list of symbols and the places of each pair."""
        symbols = self._byte_ids[list(word)].tolist()  # -1 where a symbol has gone into the one before it
        after = [*range(1, len(word)), -1]
        before = list(range(-1, len(word) - 1))
        places: dict[int, list[int]] = {}  # rank -> where its pair is, or was
        heap: list[int] = []  # ranks that have places

        def rank_at(place: int) -> int | None:
            return self._ranks.get(symbols[place] * MAX_IDS + symbols[after[place]]) if after[place] >= 0 else None

        def note(place: int) -> None:
            if (rank := rank_at(place)) is not None:
                if rank not in places:
                    heapq.heappush(heap, rank)
                places.setdefault(rank, []).append(place)

        for place in range(len(word) - 1):
            note(place)
        while heap:
            rank = heapq.heappop(heap)
            merged = []
            for place in sorted(places.pop(rank)):
                if symbols[place] >= 0 and rank_at(place) == rank:  # it may have gone since it was noted
                    right = after[place]
                    symbols[place], symbols[right] = int(self._merged_ids[rank]), -1
                    after[place] = after[right]
                    if after[place] >= 0:
                        before[after[place]] = place
                    merged.append(place)
            for place in merged:
                if before[place] >= 0:
                    note(before[place])
                note(place)
        return [symbol for symbol in symbols if symbol >= 0]

    def _last_cut(self, text: str, start: int) -> int:
        """The last place, from start on, where text can be cut whatever follows it; 0 if there is none."""
        end = len(text) - max(self._longest_special - 1, 0)  # beyond, a special token may have begun
        while (end := max(text.rfind(" ", start, end + 1), text.rfind("\n", start, end + 1))) >= start:
            if not text[end - 1].isspace() and not inside_special(text, end, self.special_tokens):
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

    def save(self, path: str | Path) -> Path:
        """Write vocabulary, merges and special tokens to a JSON file, bytes in GPT-2's printable characters; atomic."""
        vocab = {_to_printable(token): index for index, token in self.vocab.items()}
        merges = [f"{_to_printable(left)} {_to_printable(right)}" for left, right in self.merges]
        value = {"format": _FORMAT, "special_tokens": list(self.special_tokens), "vocab": vocab, "merges": merges}
        return write_json(path, value)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """A tokenizer that save() wrote. ValueError names a file that is missing, damaged or something else."""
        with _naming_damage(path):
            value = json.loads(Path(path).read_bytes())
            require(
                isinstance(value, dict) and value.get("format") == _FORMAT,
                f"{path}: not a tokenizer saved by this package (its JSON has no 'format': '{_FORMAT}')",
            )
            vocab = {index: _from_printable(token) for token, index in value["vocab"].items()}
            require(len(vocab) == len(value["vocab"]), "two tokens have the same id")
            merges = [_merge_from_line(line) for line in value["merges"]]
            return cls(vocab, merges, value["special_tokens"])

    @classmethod
    def from_files(
        cls, vocab_path: str | Path, merges_path: str | Path, special_tokens: Sequence[str] | None = (END_OF_TEXT,)
    ) -> Tokenizer:
        """A tokenizer from GPT-2's files: a JSON object of printable token -> id, and a merge a line."""
        special_tokens = check_special_tokens(special_tokens)
        vocab: dict[int, bytes] = {}
        with _naming_damage(vocab_path):
            for token, index in json.loads(Path(vocab_path).read_bytes()).items():
                vocab[index] = token.encode() if token in special_tokens else _from_printable(token)
        with _naming_damage(merges_path):
            lines = Path(merges_path).read_bytes().decode("utf-8").split("\n")
            if lines[0].startswith("#version"):
                del lines[0]
            merges = [_merge_from_line(line) for line in lines if line.strip()]
        with _naming_damage(f"{vocab_path} and {merges_path}"):
            return cls(vocab, merges, special_tokens)

    from_gpt2 = from_files

    def export_huggingface(self, path: str | Path) -> Path:
        """Write a tokenizer.json that Hugging Face `tokenizers` loads and that gives the same ids; atomic.

        Raises:
            ValueError: a special token reads like the printable form of another, which the format cannot tell apart.
        """
        special = {self.token_id(token): token for token in self.special_tokens}
        vocab = {_to_printable(token): index for index, token in self.vocab.items() if index not in special}
        for index, name in special.items():
            same = vocab.setdefault(name, index)
            what = f"special token {name!r} cannot be exported: tokenizer.json would take it for token {same}"
            require(same == index, f"{what}, {self.vocab[same]!r}")
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [{"id": index, "content": name, **flags, "special": True} for index, name in sorted(special.items())]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        model = {"type": "BPE", **dict.fromkeys(_HF_MODEL_NULL), **dict.fromkeys(_HF_MODEL_FALSE, False)}
        model["vocab"] = vocab
        model["merges"] = [[_to_printable(left), _to_printable(right)] for left, right in self.merges]
        value = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
        value |= {"pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": model}
        return write_json(path, value)

    @classmethod
    def from_huggingface(cls, path: str | Path) -> Tokenizer:
        """A tokenizer from a Hugging Face tokenizer.json, which gives the same ids.

        ValueError: the file is missing or damaged, or not byte-level BPE with GPT-2's pattern: names what it has.
        """

        def only(what: str, given: Any, *allowed: Any) -> None:
            require(
                json.dumps(given) in map(json.dumps, allowed),
                f"{path}: {what} is {json.dumps(given)[:80]}, which is not supported: only "
                f"{' or '.join(map(json.dumps, allowed))} is, as in byte-level BPE with GPT-2's pattern",
            )

        with _naming_damage(path):
            value = json.loads(Path(path).read_bytes())
            model, before, after = value["model"], value["pre_tokenizer"] or {}, value.get("post_processor") or {}
            only("the model's type", model.get("type"), "BPE")
            for name in _HF_MODEL_NULL:
                only(f"the model's {name}", model.get(name), None, "", 0.0)
            for name in _HF_MODEL_FALSE:
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
            vocab = {i: name.encode() if name in special else _from_printable(name) for name, i in names.items()}
            require(len(vocab) == len(names), "two tokens have the same id")
            merges = [
                _merge_from_line(one) if isinstance(one, str) else tuple(map(_from_printable, one))
                for one in model["merges"]
            ]
            return cls(vocab, merges, list(special))


def _encode_chunk(state: tuple[Tokenizer, str | Path], bounds: tuple[int, int]) -> tuple[np.ndarray, int]:
    tokenizer, path = state
    start, end = bounds
    with open(path, "rb") as file:
        file.seek(start)
        text = decode_utf8(file.read(end - start), path, start)
    return tokenizer.encode_to_array(text), end - start


def _merge_from_line(line: str) -> tuple[bytes, bytes]:
    left, right = line.split(" ")
    return _from_printable(left), _from_printable(right)


@contextmanager
def _naming_damage(path: str | Path):
    """A missing file, and content of an unexpected shape, become a ValueError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"no tokenizer file at {Path(path).resolve()}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at offset {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if str(path) in str(error):
            raise
        what = f"lacks or does not know {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: not a whole tokenizer file: {what}") from None
