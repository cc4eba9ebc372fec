"""The tokenizer: against byte-pair encoding written plainly, against tiktoken and `tokenizers`, and on bad input."""

import itertools
import json
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import regex
from adapters import get_tokenizer, run_train_bpe

from lmsys.bench import tokenizer as bench
from lmsys.config import END_OF_TEXT
from lmsys.data.bpe import train_bpe
from lmsys.data.pieces import piece_starts
from lmsys.data.pretokens import CUT, PIECE, PRETOKEN, WHITESPACE, find_chunk_boundaries, split_piece
from lmsys.data.tokenizer import SHORT_TEXT, Tokenizer

SHARED = Path(os.environ.get("LMSYS_SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
GPT2 = SHARED / "gpt2_vocab.json", SHARED / "gpt2_merges.txt"
NASTY = (
    "naïve café, “quotes” — 中文，日本語。 \u3000\u3000x\u00a0 \u2028\n\r\n\r\n \t tab\x00nul\x1c\x1d it's IT'S "
    "we'll 'tis 🙃👩‍👩‍👧‍👦 e\u0301 \U0010ffff ﷺ ١٢٣ x²   \n\n  three   spaces\n"
    + END_OF_TEXT
    + "\n\n"
    + END_OF_TEXT
    + END_OF_TEXT
    + " end  "
)
ALPHABET = [*"abst1 '.\n", "é", "字", "\u3000", "\xa0", "\x1c", "\r\n", "  ", "'ll", END_OF_TEXT]


# --- Byte-pair encoding, plainly ---------------------------------------------------------------------


def plain_segments(text, special_tokens):
    """The text split at special tokens, which are kept."""
    if not special_tokens:
        return [text]
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return regex.split("(" + "|".join(map(regex.escape, longest_first)) + ")", text)


def plain_merge(word, pair):
    """The word, a tuple of bytes, with the pair merged from left to right."""
    merged, i = [], 0
    while i < len(word):
        if word[i : i + 2] == pair:
            merged.append(pair[0] + pair[1])
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return tuple(merged)


def plain_train(text, vocab_size, special_tokens):
    words = Counter()
    for segment in plain_segments(text, special_tokens):
        if segment not in special_tokens:
            words.update(tuple(bytes([b]) for b in p.encode()) for p in PRETOKEN.findall(segment))
    merges, tokens = [], 256 + len(special_tokens)
    while tokens < vocab_size:
        pairs = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        tokens += 1
        merged = Counter()
        for word, count in words.items():
            merged[plain_merge(word, best)] += count
        words = merged
    return merges


def plain_encode(text, tokenizer):
    ids = {token: index for index, token in tokenizer.vocab.items()}
    result = []
    for segment in plain_segments(text, tokenizer.special_tokens):
        if segment in tokenizer.special_tokens:
            result.append(ids[segment.encode()])
            continue
        for pretoken in PRETOKEN.findall(segment):
            word = tuple(bytes([b]) for b in pretoken.encode())
            for pair in tokenizer.merges:
                word = plain_merge(word, pair)
            result += [ids[token] for token in word]
    return result


def write(path, text):
    path.write_bytes(text.encode())
    return path


def english(seed, characters):
    """A text with documents, as the benchmark makes them."""
    rng = random.Random(seed)
    common = json.loads(Path(bench.data.__file__).with_name("benchmark_words.json").read_text(encoding="utf-8"))
    words = [w for w in common["common"] for _ in range(3)] + [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(300)
    ]
    weights = list(itertools.accumulate(1 / (n + 1) for n in range(len(words))))
    parts = []
    while sum(map(len, parts)) < characters:
        parts.append("\n\n".join(bench._paragraph(rng, words, weights) for _ in range(3)) + f"\n{END_OF_TEXT}\n")
    return "".join(parts)


@pytest.fixture(scope="module")
def text():
    return english(0, 120_000)


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("text") / "text.txt", text)
    return Tokenizer.train(path, 800, num_workers=1)


# --- Training ----------------------------------------------------------------------------------------


def test_the_example_of_sennrich_et_al(tmp_path):
    words = ["low"] * 5 + ["lower"] * 2 + ["widest"] * 3 + ["newest"] * 6
    vocab, merges = train_bpe(write(tmp_path / "t", "\n".join(words)), 257 + 12, num_workers=1)
    by_hand = "s t, e st, o w, l ow, w est, n e, ne west, w i, wi d, wid est, low e, lowe r"
    assert merges == [tuple(part.encode() for part in merge.split()) for merge in by_hand.split(", ")]
    assert vocab[256] == END_OF_TEXT.encode() and vocab[257] == b"st" and vocab[268] == b"lower"


def test_training_agrees_with_the_plain_algorithm(tmp_path):
    rng = random.Random(1)
    for case in range(40):
        letters = ALPHABET if case % 2 else ["a", "b", "ab", " ", "aa"]
        text = "".join(rng.choices(letters, k=rng.randint(20, 400))) + "x"
        special = [END_OF_TEXT, "st", "s"][: case % 4]
        size = 257 + len(special) + rng.randint(0, 40)
        expected = plain_train(text, size, special)
        with pytest.warns(UserWarning) if len(expected) < size - 256 - len(special) else nullcontext():
            vocab, merges = train_bpe(write(tmp_path / "t", text), size, special, num_workers=1)
        tokens = {bytes([b]) for b in range(256)} | {s.encode() for s in special} | {a + b for a, b in expected}
        if len(tokens) == 256 + len(special) + len(expected):  # a one-letter special token takes its byte's id
            assert merges == expected
            assert set(vocab.values()) == tokens


def test_training_on_a_long_word(tmp_path):
    """Without spaces a text is one word: 200 KB took a minute when each place of a pair was a visit of the whole."""
    letters = "".join(random.Random(2).choices("ACGT", k=200_000))
    text = letters[:3000]
    assert train_bpe(write(tmp_path / "t", text), 300, num_workers=1)[1] == plain_train(text, 300, [END_OF_TEXT])
    start = time.process_time()
    train_bpe(write(tmp_path / "t", letters), 600, num_workers=1)
    assert time.process_time() - start < 10


def test_the_result_does_not_depend_on_processes_or_chunks(text, tmp_path, monkeypatch):
    path = write(tmp_path / "t", text + NASTY)
    expected = train_bpe(path, 700, num_workers=1)
    monkeypatch.setattr(find_chunk_boundaries, "__kwdefaults__", {"chunk_bytes": 5_000, "special_tokens": ()})
    monkeypatch.setattr("lmsys.data.bpe.MAX_PIECES", 100)
    assert len(find_chunk_boundaries(path)) > 10
    for num_workers in (1, 2, 3):
        assert train_bpe(path, 700, num_workers=num_workers) == expected


def test_one_process_starts_none(text, tmp_path, monkeypatch):
    monkeypatch.setattr("lmsys.data.workers.ProcessPoolExecutor", None)
    path = write(tmp_path / "t", text * 2)
    tokenizer = Tokenizer.train(path, 300, num_workers=1)
    assert (
        sum(size for _, size in tokenizer.encode_file_chunks(path, num_workers=1, chunk_bytes=9_000)) == len(text) * 2
    )


def test_workers_in_a_script_without_a_main_guard(text, tmp_path):
    path = write(tmp_path / "text.txt", text * 10)
    script = write(
        tmp_path / "script.py",
        "import torch\nfrom lmsys.data.tokenizer import Tokenizer\ntorch.ones(300, 300) @ torch.ones(300, 300)\n"
        f"t = Tokenizer.train({str(path)!r}, 300, num_workers=2)\n"
        f"print(sum(n for _, n in t.encode_file_chunks({str(path)!r}, num_workers=2, chunk_bytes=100_000)))\n",
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.split() == [str(len(text) * 10)], result.stderr


def test_special_tokens_take_no_part(tmp_path):
    text = f"ab{END_OF_TEXT}ab " * 50
    vocab, merges = run_train_bpe(write(tmp_path / "t", text), 259, [END_OF_TEXT])
    assert merges[0] == (b"a", b"b")
    assert not any(b"<" in a + b or b"|" in a + b for a, b in merges)
    assert list(vocab.values()).count(END_OF_TEXT.encode()) == 1


def test_running_out_of_pairs_warns_and_stops(tmp_path):
    with pytest.warns(UserWarning, match="instead of 1000"):
        vocab, merges = train_bpe(write(tmp_path / "t", "abc abc"), 1000)
    assert len(vocab) == 257 + len(merges) and b" abc" in vocab.values()


def test_line_ends_are_kept(tmp_path):
    path = write(tmp_path / "t", "one\r\ntwo\r\n\r\n" * 30)
    tokenizer = Tokenizer.train(path, 263)
    assert b"\r\n" in tokenizer.vocab.values()
    ids = np.concatenate([ids for ids, _ in tokenizer.encode_file_chunks(path)])
    assert tokenizer.decode(ids) == path.read_bytes().decode()


@pytest.mark.parametrize("size", [0, 256, -1])
def test_vocabulary_too_small(size, tmp_path):
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe(write(tmp_path / "t", "text"), size)
    with pytest.raises(ValueError, match="at least 259"):
        train_bpe(tmp_path / "t", 258, ["a1", "a2", "a3"])


@pytest.mark.parametrize("content, message", [(None, "no text file at"), (b"", "empty"), (b"abc\xffdef", "offset 3")])
def test_bad_files(content, message, tmp_path, trained):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        train_bpe(path, 300)
    assert "bad.txt" in str(error.value)
    with pytest.raises(ValueError, match=message):
        list(trained.encode_file_chunks(path))


def test_the_offset_of_a_bad_byte_counts_from_the_start_of_the_file(tmp_path, text):
    path = tmp_path / "bad.txt"
    path.write_bytes(text.encode() * 20 + b"\xc3(" + text.encode())
    with pytest.raises(ValueError, match=f"offset {len(text.encode()) * 20} "):
        train_bpe(path, 300, num_workers=2)


# --- Pieces and chunks -------------------------------------------------------------------------------


def test_whitespace_is_that_of_the_pattern():
    assert set(regex.findall(r"\s", "".join(map(chr, range(sys.maxunicode + 1))))) == set(WHITESPACE)


def test_pieces_and_cuts_change_no_pretoken():
    rng = random.Random(2)
    for _ in range(4000):
        text = "".join(rng.choices(ALPHABET, k=rng.randint(1, 14)))
        data = text.encode()
        expected = PRETOKEN.findall(text)
        assert [p for piece in PIECE.findall(text) for p in split_piece(piece)] == expected
        starts = piece_starts(data, text.isascii(), []).tolist()
        pieces = [data[a:b].decode() for a, b in itertools.pairwise([*starts, len(data)])]
        assert [p for piece in pieces for p in split_piece(piece)] == expected
        for cut in CUT.finditer(data):
            halves = data[: cut.start()].decode(), data[cut.start() :].decode()
            assert [p for half in halves for p in PRETOKEN.findall(half)] == expected


@pytest.mark.parametrize("special", [(), (END_OF_TEXT,), ("a b", " a", "aa", END_OF_TEXT)])
def test_chunks_have_the_pretokens_of_the_whole(special, tmp_path, monkeypatch):
    monkeypatch.setattr("lmsys.data.pretokens._SEARCH_BYTES", 16)
    rng = random.Random(3)
    for _ in range(60):
        text = "".join(rng.choices(ALPHABET, k=300))
        path = write(tmp_path / "t", text)
        bounds = find_chunk_boundaries(path, chunk_bytes=rng.randint(1, 60), special_tokens=special)
        data = path.read_bytes()
        assert bounds[0] == 0 and bounds[-1] == len(data) and bounds == sorted(set(bounds)) and len(bounds) > 3
        chunks = [data[a:b].decode() for a, b in itertools.pairwise(bounds)]

        def pretokens(text):
            segments = plain_segments(text, special)
            return [p for s in segments for p in ([s] if s in special else PRETOKEN.findall(s))]

        assert [p for chunk in chunks for p in pretokens(chunk)] == pretokens(text)


def test_cuts_lie_at_special_tokens_where_there_are_some(text, tmp_path):
    bounds = find_chunk_boundaries(write(tmp_path / "t", text), chunk_bytes=10_000, special_tokens=[END_OF_TEXT])
    assert len(bounds) > 5
    assert all(text.encode()[cut:].startswith(END_OF_TEXT.encode()) for cut in bounds[1:-1])


def test_text_without_a_safe_place_is_one_chunk(tmp_path):
    path = write(tmp_path / "t", "字" * 100_000)
    assert find_chunk_boundaries(path, chunk_bytes=1000) == [0, 300_000]


# --- Encoding ----------------------------------------------------------------------------------------


def test_encoding_agrees_with_the_plain_algorithm(trained, tmp_path):
    rng = random.Random(4)
    for _ in range(20):
        text = "".join(rng.choices(ALPHABET, k=60))
        assert trained.encode(text) == plain_encode(text, trained)
    assert trained.encode(NASTY) == plain_encode(NASTY, trained)
    overlapping = Tokenizer(trained.vocab, trained.merges, ["ab", "abab", "b ", " a", END_OF_TEXT])
    for _ in range(50):
        text = "".join(rng.choices(["a", "b", " ", "ab", END_OF_TEXT], k=20))
        assert overlapping.encode(text) == plain_encode(text, overlapping)
    text = "".join(rng.choices([*ALPHABET, "ab", "abab", "the "], k=8000))
    letters = Tokenizer(trained.vocab, trained.merges, ["ab", "the", "b ", " a", " s.", "é", END_OF_TEXT])
    assert len(text) > SHORT_TEXT and letters.encode(text) == plain_encode(text, letters)
    assert overlapping.encode("ababab") == [overlapping.token_id("abab"), overlapping.token_id("ab")]


def test_short_and_long_texts_and_all_ways_of_merging_agree(tmp_path):
    rng = random.Random(5)
    train = "".join(rng.choices(["a", "b", "ab", "ba", " "], k=3000))
    tokenizer = Tokenizer.train(write(tmp_path / "t", train), 320, num_workers=1)
    words = ["".join(rng.choices("ab", k=rng.randint(1, 40))) for _ in range(300)] + ["a" * n for n in range(1, 100)]
    merged = [plain_encode(word, tokenizer) for word in words]
    symbols, counts = tokenizer._merge_many(
        np.frombuffer("".join(words).encode(), np.uint8).astype(np.int64), np.array([len(word) for word in words])
    )
    assert symbols.tolist() == list(itertools.chain(*merged)) and counts.tolist() == list(map(len, merged))
    assert [tokenizer._merge(word.encode()) for word in words] == merged

    text = "".join(rng.choices([*ALPHABET, "abababab", "a" * 40, "字字字字字字", "x" * 100], k=20_000))
    short = np.frombuffer(tokenizer._encode_short(text), tokenizer.token_dtype)
    assert np.array_equal(tokenizer._encode_long(text), short)
    assert np.array_equal(tokenizer._encode_long(text), short)  # now from the table
    assert tokenizer.decode(short) == text


def test_caches_are_bounded_and_may_be_emptied_at_any_time(trained, text, monkeypatch):
    monkeypatch.setattr("lmsys.data.tokenizer.MAX_PIECES", 256)
    tokenizer = Tokenizer(trained.vocab, trained.merges, trained.special_tokens)
    assert np.array_equal(tokenizer.encode_to_array(text), trained.encode_to_array(text))
    assert [tokenizer.encode(line) for line in text.splitlines(True)] == list(
        map(trained.encode, text.splitlines(True))
    )
    assert max(len(tokenizer._pieces), len(tokenizer._table._offsets)) <= 256


def test_round_trip_of_any_text(trained):
    rng = random.Random(6)
    for _ in range(50):
        codes = [rng.randrange(0x110000) for _ in range(200)] + rng.choices(range(128), k=200)
        text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
        assert trained.decode(trained.encode(text)) == text
    long = NASTY * 200
    assert trained.decode(trained.encode(long)) == long
    assert trained.encode("") == [] and trained.decode([]) == ""
    assert trained.encode_to_array("").dtype == np.uint16
    for text in ("ab\ud800c", "x" * 10_000 + "\udfff"):
        with pytest.raises(ValueError, match=f"surrogate, U.* at character {len(text) - 2 + (text[0] == 'x')}"):
            trained.encode(text)


def test_decoding(trained):
    assert trained.decode([0xE5, 0xAD]) == "\ufffd"
    assert trained.decode([0xFF, 65, 0x80]) == "\ufffdA\ufffd"
    assert trained.decode(np.array([72, 105], np.uint16)) == "Hi"
    assert trained.decode([trained.token_id(END_OF_TEXT)]) == END_OF_TEXT
    for bad in (800, -1, 10**9):
        with pytest.raises(ValueError, match=f"token id {bad} is not in the vocabulary.*0 to 799"):
            trained.decode([65, bad])


def test_arrays_and_types(trained, text):
    array = trained.encode_to_array(text)
    assert array.dtype == np.uint16 and array.flags.writeable and array.tolist() == trained.encode(text)
    many = Tokenizer({**trained.vocab, 70_000: b"<far>"}, trained.merges, [END_OF_TEXT, "<far>"])
    assert many.vocab_size == 70_001 and many.token_dtype is np.uint32
    assert many.encode(f"<far>{text}") == [70_000, *trained.encode(text)]
    assert trained.token_id("the") == trained.encode("the")[0]
    with pytest.raises(ValueError, match="not a token"):
        trained.token_id("no such token")


def test_iterables(trained):
    text = NASTY * 5 + "plain words " * 20 + END_OF_TEXT
    rng = random.Random(7)
    for special in ([END_OF_TEXT], ["plain w", "s p", END_OF_TEXT], []):
        tokenizer = Tokenizer(trained.vocab, trained.merges, special)
        expected = tokenizer.encode(text)
        for longest in (1, 3, 50):
            parts, at = [], 0
            while at < len(text):
                parts.append(text[at : at + rng.randint(0, longest)])
                at += len(parts[-1])
            assert list(tokenizer.encode_iterable(parts)) == expected
        assert list(tokenizer.encode_iterable(text.splitlines(True))) == expected


def test_iterables_are_taken_as_needed_and_in_bounded_memory(trained):
    taken = []
    parts = (taken.append(n) or f"line {n} of many\n" for n in itertools.count())
    ids = trained.encode_iterable(parts)
    assert [next(ids) for _ in range(3)] == trained.encode("line 0 of many")[:3] and len(taken) <= 2

    line = "The same line of words comes again and again.\n"
    list(trained.encode_iterable(itertools.repeat(line, 100)))
    tracemalloc.start()
    count = sum(1 for _ in trained.encode_iterable(itertools.repeat(line, 5_000)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 50_000 and peak < 100_000


def test_files_in_chunks(trained, text, tmp_path):
    path = write(tmp_path / "t", text + NASTY)
    expected = trained.encode_to_array(text + NASTY)
    for workers in (1, 2):
        chunks = list(trained.encode_file_chunks(path, num_workers=workers, chunk_bytes=20_000))
        assert len(chunks) > 4 and sum(size for _, size in chunks) == path.stat().st_size
        assert np.array_equal(np.concatenate([ids for ids, _ in chunks]), expected)
    chunks = trained.encode_file_chunks(path, num_workers=2, chunk_bytes=20_000)
    next(chunks)
    chunks.close()
    assert not multiprocessing.active_children()


# --- Beside the others -------------------------------------------------------------------------------


def as_tiktoken(tokenizer):
    tiktoken = pytest.importorskip("tiktoken")
    special = {token: tokenizer.token_id(token) for token in tokenizer.special_tokens}
    ranks = {token: index for index, token in tokenizer.vocab.items() if index not in special.values()}
    return tiktoken.Encoding("t", pat_str=PRETOKEN.pattern, mergeable_ranks=ranks, special_tokens=special)


def test_ids_of_tiktoken_given_our_ranks(trained, text):
    encoding = as_tiktoken(trained)
    for sample in (text, NASTY, "", " ", "a" * 300):
        assert trained.encode(sample) == encoding.encode(sample, allowed_special="all")
    ids = random.Random(8).choices(range(800), k=500)
    assert trained.decode(ids) == encoding.decode(ids)


def test_ids_of_tokenizers_given_our_export(trained, text, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    several = Tokenizer(trained.vocab, trained.merges, [END_OF_TEXT, "<a b>", "<a", "é☃"])
    exported = tokenizers.Tokenizer.from_file(str(several.export_huggingface(tmp_path / "tokenizer.json")))
    for sample in (text, NASTY, "<a <a b><a b é☃é"):
        assert exported.encode(sample).ids == several.encode(sample)
        assert exported.decode(several.encode(sample), skip_special_tokens=False) == sample
    with pytest.raises(ValueError, match="cannot be exported"):
        Tokenizer(trained.vocab, trained.merges, ["Ġ"]).export_huggingface(tmp_path / "no.json")
    assert not (tmp_path / "no.json").exists()


def test_merges_of_tokenizers_trained_on_the_same_text(tmp_path):
    """Where no two pairs are tied, `tokenizers` learns the same merges."""
    tokenizers = pytest.importorskip("tokenizers")
    text = "".join(f" {'abcdefgh'[:n]}" * 7**n for n in range(2, 6))
    path = write(tmp_path / "t", text)
    other = tokenizers.Tokenizer(tokenizers.models.BPE())
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    other.train(
        [str(path)], tokenizers.trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet, show_progress=False)
    )
    tokens = {b.decode() for b in train_bpe(path, 260, [])[0].values() if len(b) > 1}
    assert tokens == {token.replace("Ġ", " ") for token in other.get_vocab() if len(token) > 1}


@pytest.mark.skipif(not all(path.exists() for path in GPT2), reason="GPT-2's files are not in the shared data folder")
def test_gpt2_files(text):
    gpt2 = Tokenizer.from_gpt2(*GPT2)
    encoding = as_tiktoken(gpt2)
    assert gpt2.vocab_size == 50_257 and gpt2.token_id(END_OF_TEXT) == 50_256
    assert gpt2.encode("Hello, world! It's") == [15496, 11, 995, 0, 632, 338]
    for sample in (text, NASTY):
        assert gpt2.encode(sample) == encoding.encode(sample, allowed_special="all")
    adapted = get_tokenizer(gpt2.vocab, gpt2.merges, [END_OF_TEXT, END_OF_TEXT * 2])
    assert adapted.encode(END_OF_TEXT * 3) == [50_257, 50_256]
    assert list(get_tokenizer(gpt2.vocab, gpt2.merges).encode_iterable([END_OF_TEXT])) == encoding.encode_ordinary(
        END_OF_TEXT
    )


# --- Files -------------------------------------------------------------------------------------------


def test_save_and_load(trained, text, tmp_path):
    path = trained.save(tmp_path / "folder" / "tokenizer.json")
    for copy in (Tokenizer.load(path), pickle.loads(pickle.dumps(trained))):
        assert (copy.vocab, copy.merges, copy.special_tokens) == (trained.vocab, trained.merges, trained.special_tokens)
        assert copy.encode(text[:2000] + NASTY) == trained.encode(text[:2000] + NASTY)
    assert os.listdir(path.parent) == ["tokenizer.json"]


def damage(change):
    def apply(value):
        change(value)
        return json.dumps(value)

    return apply


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda value: json.dumps(value)[:-100], "not a JSON file"),
        (lambda value: "[]", "not a tokenizer saved by this package"),
        (damage(lambda value: value.pop("format")), "not a tokenizer saved by this package"),
        (damage(lambda value: value.pop("merges")), "merges"),
        (damage(lambda value: value["vocab"].pop("a")), "lacks 1 of the 256 single bytes, first b'a'"),
        (damage(lambda value: value["merges"].append("ĠqzĠ q")), "vocabulary lacks b' qz '"),
        (damage(lambda value: value["merges"].append("abc")), "not a whole tokenizer"),
        (damage(lambda value: value["vocab"].update({"☃": 900})), "☃"),
        (damage(lambda value: value["vocab"].update({"zzz": 5})), "same id"),
        (damage(lambda value: value["vocab"].update({"zzz": "5"})), "'5'"),
        (damage(lambda value: value.update(vocab=[1])), "not a whole tokenizer"),
        (damage(lambda value: value.update(special_tokens=["", "a"])), "non-empty"),
    ],
)
def test_damaged_files(change, message, trained, tmp_path):
    path = trained.save(tmp_path / "tokenizer.json")
    path.write_text(change(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(path)
    assert "tokenizer.json" in str(error.value) and "\n" not in str(error.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer file at .*gone.json"):
        Tokenizer.load(tmp_path / "gone.json")
    (tmp_path / "binary").write_bytes(b"\x93NUMPY\xff")
    with pytest.raises(ValueError, match="binary: not UTF-8"):
        Tokenizer.load(tmp_path / "binary")
    write(tmp_path / "vocab.json", json.dumps({"a": 0}))
    write(tmp_path / "merges.txt", "#version: 0.2\na b\n")
    with pytest.raises(ValueError, match=r"vocab.json and .*merges.txt.*255 of the 256"):
        Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt")


def test_parts_that_do_not_fit_together(trained):
    with pytest.raises(ValueError, match="twice, as ids 97 and 900"):
        Tokenizer({**trained.vocab, 900: b"a"}, trained.merges)
    with pytest.raises(ValueError, match="has a token twice"):
        Tokenizer(trained.vocab, trained.merges, ["a", "a"])
    with pytest.raises(ValueError, match="give a list of strings"):
        Tokenizer(trained.vocab, trained.merges, END_OF_TEXT)
    with pytest.raises(ValueError, match="surrogate"):
        Tokenizer(trained.vocab, trained.merges, ["\ud800"])
