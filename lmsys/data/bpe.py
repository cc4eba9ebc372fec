"""Training a byte-level byte-pair encoding, with pre-tokens counted in parallel.

Source: Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units" (2016), section 3.2,
over bytes. Pairs are counted within pre-tokens; the most frequent pair becomes a token, ties go to the
lexicographically greater pair of byte strings. A word is a `str` whose characters are token ids, so merging a pair is
`str.replace`. Counts are updated only where the merged pair occurs, and the next pair comes from a heap with lazy
deletion. Memory grows with the number of distinct pre-tokens of the text, not with its length.
"""

from __future__ import annotations

import heapq
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from operator import add
from pathlib import Path

from tqdm import tqdm

from lmsys.config import END_OF_TEXT, require
from lmsys.data.pretokens import (
    MAX_IDS,
    MAX_PIECES,
    PIECE,
    check_special_tokens,
    decode_utf8,
    find_chunk_boundaries,
    special_pattern,
    split_piece,
)
from lmsys.data.workers import map_in_order, resolve_workers

_TASK_CHUNKS = 16  # chunks that a counting task goes through before it sends its counts back


def train_bpe(
    input_path: str | Path,
    vocab_size: int,
    special_tokens: Sequence[str] = (END_OF_TEXT,),
    *,
    num_workers: int | None = None,
    progress: bool = False,
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """Learn a byte-level BPE vocabulary from a UTF-8 file, whose line ends are kept.

    Args:
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
    special_tokens = check_special_tokens(special_tokens)
    least = 256 + max(1, len(special_tokens))
    allowed = f"at least {least}, 256 bytes and {least - 256} more, and at most {MAX_IDS}"
    require(least <= vocab_size <= MAX_IDS, f"vocab_size is {vocab_size}; it must be {allowed}")
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


def _count_pretokens(path: str | Path, special_tokens: Sequence[str], workers: int, progress: bool) -> Counter:
    """How often each pre-token occurs in the file."""
    bounds = find_chunk_boundaries(path, special_tokens=special_tokens)
    chunks = len(bounds) - 1
    tasks = -(-chunks // (workers * _TASK_CHUNKS)) * workers  # a multiple of the workers, so that they end together
    step = -(-chunks // tasks)
    spans = [bounds[i : i + step + 1] for i in range(0, chunks, step)]
    counts: Counter[str] = Counter()
    with tqdm(total=bounds[-1], desc="counting words", unit="B", unit_scale=True, disable=not progress) as bar:
        results = map_in_order(_count_span, (path, special_tokens), spans, min(workers, len(spans)))
        for span, counted in zip(spans, results, strict=True):
            counts.update(counted)
            bar.update(span[-1] - span[0])
    return counts


def _count_span(state: tuple[str | Path, Sequence[str]], bounds: Sequence[int]) -> Counter:
    """Count the pre-tokens of the file's chunks between bounds, one chunk in memory at a time."""
    path, special_tokens = state
    special = special_pattern(special_tokens)
    pieces, counts = Counter(), Counter()
    with open(path, "rb") as file:
        file.seek(bounds[0])
        for start, end in pairwise(bounds):
            text = decode_utf8(file.read(end - start), path, start)
            for segment in special.split(text) if special else (text,):
                pieces.update(PIECE.findall(segment))
            if len(pieces) > MAX_PIECES or end == bounds[-1]:
                for piece, count in pieces.items():
                    for pretoken in split_piece(piece):
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

    with tqdm(total=vocab_size - len(vocab), desc="learning merges", disable=not progress) as bar:
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
            for new in _merge_pair(pair, chr(ids[token]), words, frequencies, counts, places):
                heapq.heappush(heap, (-counts[new], descending[new[0]], descending[new[1]], new))
    return list(merges)


def _merge_pair(
    pair: str, merged: str, words: list[str], frequencies: list[int], counts: dict[str, int], places: dict[str, list]
) -> set[str]:
    """Replace pair by merged in all words and update the counts around it. Returns the pairs that are now more."""
    left, right = pair
    grown: set[str] = set()
    for index in set(places.pop(pair)):  # a word once, however often it has the pair
        if pair not in words[index]:
            continue
        word = words[index] = words[index].replace(pair, merged)
        frequency = frequencies[index]
        last = len(word) - 1
        at = word.find(merged)
        while at >= 0:
            new = []
            if at > 0:
                before = word[at - 1]
                counts[(right if before == merged else before) + left] -= frequency
                new.append(before + merged)
            if at < last and (after := word[at + 1]) != merged:
                counts[right + after] -= frequency
                new.append(merged + after)
            for one in new:
                counts[one] += frequency
                places[one].append(index)
            grown.update(new)
            at = word.find(merged, at + 1)
    del counts[pair]
    return grown


def _descending(token: bytes) -> str:
    """A key that orders byte strings the other way round."""
    return "".join(chr(255 - byte) for byte in token) + "\u0100"
