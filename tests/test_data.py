import errno
import json
import resource
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from lmsys.config import END_OF_TEXT, DataConfig
from lmsys.data import corpora as data
from lmsys.data.tokenizer import Tokenizer


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(data, "tinystories_unreachable", lambda: "no network in this test")


@pytest.fixture
def hub(monkeypatch):
    """A hub that can be reached, with small splits; hub.break_after = n breaks a stream off after n stories."""
    hub = types.SimpleNamespace(break_after=None, asked=[])
    splits = {"train": [f"Train story {i}.\n" for i in range(300)], "validation": [f"Valid {i} é." for i in range(40)]}

    def load_dataset(name, *, split, streaming):
        hub.asked.append((name, split, streaming))
        for i, text in enumerate(splits[split]):
            if split == "train" and i == hub.break_after:
                raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
            yield {"text": text}

    monkeypatch.setattr(data, "tinystories_unreachable", lambda: None)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return hub


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "input" / "text.txt"
    path.parent.mkdir()
    path.write_text("".join(f"Line {i} of the téxt.\n" for i in range(1000)), encoding="utf-8")
    return path


@pytest.fixture
def token_files(tmp_path):
    paths = [tmp_path / "a.npy", tmp_path / "b.npy"]
    for path in paths:
        np.save(path, np.arange(100, dtype=np.uint16))
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "text.txt"
    path.write_text("the cat and the dog ran to the café with the cat\n" * 20 + END_OF_TEXT, encoding="utf-8")
    return Tokenizer.train(path, 275, (END_OF_TEXT,), num_workers=1, progress=False)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- Routing --------------------------------------------------------------------------------------


def test_routing_stories(tmp_path):
    corpus = data.prepare_corpus(DataConfig("stories", text_mb=0.05, seed=3), tmp_path, progress=False)
    assert corpus.mode == "stories" and corpus.train_tokens is None and corpus.valid_tokens is None
    assert files(tmp_path) == ["train.txt", "valid.txt"]
    train, valid = corpus.train_text.read_text(), corpus.valid_text.read_text()
    assert train.endswith(f"{END_OF_TEXT}\n") and valid.endswith(f"{END_OF_TEXT}\n") and valid[0].isalpha()
    assert len(train) + len(valid) >= 50_000 and 0.02 < len(valid) / len(train + valid) < 0.1
    again = data.prepare_corpus(DataConfig("stories", text_mb=0.05, seed=3), tmp_path / "again", progress=False)
    assert again.train_text.read_text() == train


def test_routing_local_text(tmp_path, text):
    config = DataConfig("local_text", text_path=str(text), valid_fraction=0.1)
    corpus = data.prepare_corpus(config, tmp_path / "run", progress=False)
    assert corpus.mode == "local_text"
    train, valid = corpus.train_text.read_bytes(), corpus.valid_text.read_bytes()
    assert train + valid == text.read_bytes()
    assert train.endswith(b"\n") and valid.startswith(b"Line ") and abs(len(valid) / len(train + valid) - 0.1) < 0.005


def test_routing_local_text_with_a_validation_file_uses_both_in_place(tmp_path, text):
    valid = tmp_path / "valid-of-mine.txt"
    valid.write_text("Some lines.")
    config = DataConfig("local_text", text_path=str(text), valid_text_path=str(valid))
    corpus = data.prepare_corpus(config, tmp_path / "run", progress=False)
    assert (corpus.train_text, corpus.valid_text) == (text, valid)


def test_routing_local_npy(tmp_path, token_files):
    config = DataConfig("local_npy", train_tokens_path=token_files[0], valid_tokens_path=token_files[1])
    corpus = data.prepare_corpus(config, tmp_path / "run")
    assert [str(corpus.train_tokens), str(corpus.valid_tokens)] == token_files
    assert corpus.mode == "local_npy" and corpus.train_text is None and corpus.valid_text is None
    assert not (tmp_path / "run").exists()


def test_routing_tinystories(tmp_path, hub):
    corpus = data.prepare_corpus(DataConfig("tinystories", text_mb=None), tmp_path, progress=False)
    assert corpus.mode == "tinystories" and files(tmp_path) == ["train.txt", "valid.txt"]
    assert sorted(hub.asked) == [(data.TINYSTORIES, "train", True), (data.TINYSTORIES, "validation", True)]
    assert corpus.train_text.read_text().count(END_OF_TEXT) == 300
    assert corpus.train_text.read_text().startswith(f"Train story 0.\n{END_OF_TEXT}\nTrain story 1.\n")
    assert corpus.valid_text.read_text(encoding="utf-8").endswith(f"Valid 39 é.\n{END_OF_TEXT}\n")


def test_routing_tinystories_stops_at_text_mb(tmp_path, hub):
    config = DataConfig("tinystories", text_mb=0.004, valid_fraction=0.25)
    corpus = data.prepare_corpus(config, tmp_path, progress=False)
    assert 3000 <= corpus.train_text.stat().st_size < 3050
    assert 1000 <= corpus.valid_text.stat().st_size < 1050


def test_routing_auto_order(tmp_path, text, token_files, hub, monkeypatch):
    tokens = {"train_tokens_path": token_files[0], "valid_tokens_path": token_files[1]}

    def mode(**settings):
        taken, reason = data.choose_mode(DataConfig("auto", **settings))
        return taken, reason

    assert mode(text_path=str(text), **tokens)[0] == "local_npy"
    taken, reason = mode(text_path=str(text))
    assert taken == "local_text" and "no token files are configured" in reason and str(text) in reason
    assert mode(text_path=str(text), **{**tokens, "valid_tokens_path": "gone.npy"})[0] == "local_text"
    assert "only one" in mode(text_path=str(text), train_tokens_path=token_files[0])[1]
    taken, reason = mode(text_path="gone.txt")
    assert taken == "tinystories" and "gone.txt" in reason
    monkeypatch.setattr(data, "tinystories_unreachable", lambda: "the cable is out")
    taken, reason = mode()
    assert taken == "stories" and "the cable is out" in reason and "\n" not in reason


def test_routing_auto_without_anything_generates_stories_though_text_mb_is_null(tmp_path, no_hub, monkeypatch):
    monkeypatch.setattr(data, "AUTO_STORIES_MB", 0.02)
    corpus = data.prepare_corpus(DataConfig("auto", text_mb=None), tmp_path, progress=False)
    assert corpus.mode == "stories" and corpus.train_text.stat().st_size > 15_000


def test_relative_paths_are_tried_from_the_working_directory_then_the_repository(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    (tmp_path / "repo").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(data.records, "REPOSITORY", tmp_path / "repo")
    config = DataConfig("local_text", text_path="my.txt")
    with pytest.raises(ValueError, match=r"my\.txt") as error:
        data.choose_mode(config)
    assert str(tmp_path / "cwd" / "my.txt") in str(error.value) and str(tmp_path / "repo" / "my.txt") in str(
        error.value
    )
    (tmp_path / "repo" / "my.txt").write_text("from the repository")
    assert data.find_input("my.txt") == tmp_path / "repo" / "my.txt"
    (tmp_path / "cwd" / "my.txt").write_text("from here")
    assert data.find_input("my.txt") == tmp_path / "cwd" / "my.txt"


# --- TinyStories out of reach ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline_settings_are_respected(name, monkeypatch):
    for other in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "1")
    assert data.tinystories_unreachable() == f"{name} is set"


def test_probe_gives_up_in_time(monkeypatch):
    class HfApi:
        def dataset_info(self, *args, **options):
            time.sleep(3)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=HfApi))
    start = time.perf_counter()
    assert "no answer" in data.tinystories_unreachable(timeout_s=0.05)
    assert time.perf_counter() - start < 1
    HfApi.dataset_info = lambda *args, **options: None
    assert data.tinystories_unreachable(timeout_s=2) is None


def test_unreachable_tinystories_names_the_other_modes(tmp_path, no_hub):
    with pytest.raises(OSError, match="cannot be reached") as error:
        data.prepare_corpus(DataConfig("tinystories"), tmp_path)
    assert all(mode in str(error.value) for mode in ("stories", "local_text", "local_npy"))
    assert files(tmp_path) == []


def test_broken_download_leaves_what_was_there(tmp_path, hub):
    (tmp_path / "train.txt").write_text("earlier")
    hub.break_after = 20
    with pytest.raises(OSError, match=r"broke off.*local_text"):
        data.prepare_corpus(DataConfig("tinystories"), tmp_path, progress=False)
    assert files(tmp_path) == ["train.txt"] and (tmp_path / "train.txt").read_text() == "earlier"


# --- Bad texts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file"),
        (b"", "is empty"),
        (b" \n\t\n", "only white space"),
        (b"abc\xff", "not UTF-8.*byte 3"),
        (b"x" * data._CHUNK_BYTES + b"\xe9t", f"not UTF-8.*byte {data._CHUNK_BYTES}"),
        (b"x" * (data._CHUNK_BYTES - 1) + b"\xc3\xc3", f"not UTF-8.*byte {data._CHUNK_BYTES - 1}"),
        ("é".encode()[:1], "not UTF-8.*byte 0"),
    ],
)
def test_bad_text(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        data.prepare_corpus(DataConfig("local_text", text_path=str(path)), tmp_path / "run")
    assert "bad.txt" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_character_across_a_chunk_border_is_good_text(tmp_path):
    path = tmp_path / "good.txt"
    path.write_bytes(b"x" * (data._CHUNK_BYTES - 1) + "é".encode())
    assert data.check_text(path) == data._CHUNK_BYTES + 1


def test_split_prefers_a_document_separator(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(f"first line\nsecond\n{END_OF_TEXT}\n" * 50)
    corpus = data.prepare_corpus(DataConfig("local_text", text_path=str(text), valid_fraction=0.13), tmp_path / "run")
    assert corpus.train_text.read_text().endswith(f"{END_OF_TEXT}\n")
    assert corpus.valid_text.read_text().startswith("first line")


def test_split_without_a_line_end_cuts_between_characters(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("語" * 101, encoding="utf-8")
    corpus = data.prepare_corpus(DataConfig("local_text", text_path=str(text)), tmp_path / "run")
    assert 0 < len(corpus.valid_text.read_text(encoding="utf-8")) < 10
    assert len(corpus.train_text.read_text(encoding="utf-8")) > 90


@pytest.mark.parametrize("content", ["a", "ab\n", "one line\n \n"])
def test_text_too_short_to_split(tmp_path, content):
    text = tmp_path / "short.txt"
    text.write_text(content)
    with pytest.raises(ValueError, match=r"short\.txt is too short"):
        data.prepare_corpus(DataConfig("local_text", text_path=str(text)), tmp_path / "run")
    assert not (tmp_path / "run").exists() or files(tmp_path / "run") == []


# --- Unwritable places ----------------------------------------------------------------------------


def test_folder_that_cannot_be_made(tmp_path, text):
    (tmp_path / "file").write_text("in the way")
    for config in (DataConfig("stories", text_mb=0.01), DataConfig("local_text", text_path=str(text))):
        with pytest.raises(OSError, match="file"):
            data.prepare_corpus(config, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"


def test_full_disk_is_an_error_with_the_path_and_leaves_no_temporary_file(tmp_path, text, tokenizer):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # stands for a full disk: a write that fails half-way
    try:
        with pytest.raises(OSError, match=r"run/train\.txt"):
            data.prepare_corpus(DataConfig("stories", text_mb=0.1), tmp_path / "run", progress=False)
        with pytest.raises(OSError, match=r"run/train\.txt"):
            data.prepare_corpus(DataConfig("local_text", text_path=str(text)), tmp_path / "run", progress=False)
        with pytest.raises(OSError, match=r"run/text\.npy"):
            data.tokenize_to_npy(text, tokenizer, tmp_path / "run" / "text.npy", num_workers=1, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path / "run") == []


# --- Token files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 2])
def test_token_file_holds_what_encode_gives(tmp_path, tokenizer, num_workers):
    text = f"the cat and the dog\n{END_OF_TEXT}\nthe café, naïve 語 🙂\n" * 3000
    source, out = tmp_path / "text.txt", tmp_path / "tokens.npy"
    source.write_text(text, encoding="utf-8")
    count = data.tokenize_to_npy(source, tokenizer, out, num_workers=num_workers, progress=False)
    tokens = data.load_tokens(out, vocab_size=tokenizer.vocab_size, context_length=16)
    assert tokens.tolist() == tokenizer.encode(text) and len(tokens) == count
    assert tokens.dtype == np.uint16 and isinstance(tokens, np.memmap) and not tokens.flags.writeable
    assert files(tmp_path) == ["text.txt", "tokens.npy"]


class FakeTokenizer:
    """Bytes as uint32 ids in chunks; raises after break_after chunks."""

    token_dtype, vocab_size = np.uint32, 100_000

    def __init__(self, break_after=None):
        self.break_after = break_after

    def encode_file_chunks(self, path, *, num_workers=None):
        for i, byte in enumerate(Path(path).read_bytes()):
            if i == self.break_after:
                raise RuntimeError("a worker died")
            yield np.array([byte + 70_000], dtype=np.uint32), 1


def test_large_vocabulary_makes_uint32(tmp_path):
    (tmp_path / "text.txt").write_text("abc")
    assert data.tokenize_to_npy(tmp_path / "text.txt", FakeTokenizer(), tmp_path / "t.npy", progress=False) == 3
    tokens = data.load_tokens(tmp_path / "t.npy")
    assert tokens.dtype == np.uint32 and tokens.tolist() == [70_097, 70_098, 70_099]


def test_tokenization_that_breaks_off_leaves_the_earlier_file(tmp_path):
    source, out = tmp_path / "text.txt", tmp_path / "t.npy"
    source.write_text("abcdef")
    data.tokenize_to_npy(source, FakeTokenizer(), out, progress=False)
    before = out.read_bytes()
    with pytest.raises(RuntimeError, match="a worker died"):
        data.tokenize_to_npy(source, FakeTokenizer(break_after=3), out, progress=False)
    assert out.read_bytes() == before and files(tmp_path) == ["t.npy", "text.txt"]


@pytest.mark.parametrize("content", [b"", b"abc\xff"])
def test_tokenization_of_a_bad_text(tmp_path, tokenizer, content):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.txt"):
        data.tokenize_to_npy(tmp_path / "bad.txt", tokenizer, tmp_path / "t.npy", progress=False)
    with pytest.raises(ValueError, match=r"bad\.txt"):
        data.TextFileDataset(tmp_path / "bad.txt", tokenizer)
    assert files(tmp_path) == ["bad.txt"]


def test_bad_token_files(tmp_path):
    path = tmp_path / "bad.npy"

    def fails(message, **options):
        with pytest.raises(ValueError, match=message) as error:
            data.load_tokens(path, **options)
        assert str(path) in str(error.value) and "\n" not in str(error.value)

    fails("no token file")
    path.write_bytes(b"")
    fails("not a whole .npy")
    path.write_bytes(b"These are not tokens.")
    fails("not a whole .npy")
    np.save(path, np.arange(1000, dtype=np.uint16))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    fails("not a whole .npy")
    path.write_bytes(whole[:50])
    fails("not a whole .npy")
    path.write_bytes(whole.replace(b"'descr'", b"'dexcr'"))
    fails("not a whole .npy")
    path.write_bytes(whole + b"??")
    fails("2 bytes follow")
    np.save(path, np.array([{}], dtype=object))
    fails("not a whole .npy")
    with path.open("wb") as file:
        np.savez(file, tokens=np.arange(3))
    fails("archive")
    for wrong in (np.arange(4.0), np.arange(4), np.zeros((2, 2), np.uint16), np.array(3, np.uint16)):
        np.save(path, wrong)
        fails("1-D, uint16 or uint32")
    np.save(path, np.zeros(0, np.uint16))
    fails("no tokens")
    np.save(path, np.arange(16, dtype=np.uint16))
    fails("too few for one context of 16", context_length=16)
    assert len(data.load_tokens(path, context_length=15)) == 16


def test_ids_beyond_the_vocabulary_are_found_in_every_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_SCAN_TOKENS", 64)
    for at in (0, 63, 64, 199):
        tokens = np.zeros(200, np.uint16)
        tokens[at] = 300
        np.save(tmp_path / "t.npy", tokens)
        with pytest.raises(ValueError, match=r"t\.npy holds token id 300, beyond the vocabulary of 300"):
            data.load_tokens(tmp_path / "t.npy", vocab_size=300)
        data.load_tokens(tmp_path / "t.npy", vocab_size=301)


# --- Batches --------------------------------------------------------------------------------------


def draw(sampler, times):
    return [sampler.next() for _ in range(times)]


def same(left, right):
    return all(np.array_equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True))


TOKENS = np.arange(1000, dtype=np.uint16)


def test_batches_are_windows_with_targets_one_later():
    inputs, targets = data.BatchSampler(TOKENS, 5, 8).next()
    assert inputs.shape == targets.shape == (5, 8) and inputs.dtype == targets.dtype == np.int64
    assert np.array_equal(targets, inputs + 1) and np.array_equal(np.diff(inputs, axis=1), np.ones((5, 7)))


def test_every_window_can_be_drawn():
    sampler = data.BatchSampler(TOKENS[:10], 64, 7)
    starts = {int(start) for inputs, _ in draw(sampler, 5) for start in inputs[:, 0]}
    assert starts == {0, 1, 2}


def test_sampler_is_deterministic_in_its_seed():
    first = draw(data.BatchSampler(TOKENS, 4, 8, seed=1), 5)
    assert same(first, draw(data.BatchSampler(TOKENS, 4, 8, seed=1), 5))
    assert not same(first, draw(data.BatchSampler(TOKENS, 4, 8, seed=2), 5))
    assert not np.array_equal(first[0][0], first[1][0])


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_together_draw_what_one_process_does(world_size):
    whole = draw(data.BatchSampler(TOKENS, 6, 8, seed=5), 4)
    ranks = [
        draw(data.BatchSampler(TOKENS, 6 // world_size, 8, seed=5, rank=rank, world_size=world_size), 4)
        for rank in range(world_size)
    ]
    for i, (inputs, targets) in enumerate(whole):
        assert np.array_equal(np.concatenate([rank[i][0] for rank in ranks]), inputs)
        assert np.array_equal(np.concatenate([rank[i][1] for rank in ranks]), targets)


@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 6), (2, 3), (3, 2)])
def test_micro_batches_together_are_one_draw(world_size, micro_batches):
    """However 12 sequences a step are shared among ranks and micro-batches, the steps are the same."""
    whole = draw(data.BatchSampler(TOKENS, 12, 8, seed=5), 2)
    sizes = {"micro_batches": micro_batches, "world_size": world_size}
    ranks = [
        draw(data.BatchSampler(TOKENS, 2, 8, seed=5, rank=rank, **sizes), 2 * micro_batches)
        for rank in range(world_size)
    ]
    parts = [rank[i] for i in range(2 * micro_batches) for rank in ranks]
    for which in (0, 1):
        together = np.concatenate([part[which] for part in parts])
        assert np.array_equal(together, np.concatenate([batch[which] for batch in whole]))


def test_sampler_continues_exactly_from_its_state():
    sampler = data.BatchSampler(TOKENS, 4, 8, seed=7)
    draw(sampler, 3)
    state = json.loads(json.dumps(sampler.state_dict()))
    rest = draw(sampler, 3)
    again = data.BatchSampler(TOKENS, 4, 8, seed=7)
    again.load_state_dict(state)
    assert same(rest, draw(again, 3))
    half = data.BatchSampler(TOKENS, 2, 8, seed=7, rank=1, world_size=2)  # the same batch over other ranks
    half.load_state_dict(state)
    assert np.array_equal(half.next()[0], rest[0][0][2:])
    split = data.BatchSampler(TOKENS, 2, 8, seed=7, micro_batches=2)  # and over micro-batches
    split.load_state_dict(state)
    assert np.array_equal(np.concatenate([split.next()[0], split.next()[0]]), rest[0][0])
    assert split.state_dict()["draws"] == state["draws"] + 1


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"seed": 8}, "seed"),
        ({"batch_size": 5}, "global_batch_size"),
        ({"context_length": 9}, "context_length"),
        ({"tokens": TOKENS[:-1]}, "num_tokens"),
    ],
)
def test_state_of_another_run_is_refused(other, name):
    settings = {"tokens": TOKENS, "batch_size": 4, "context_length": 8, "seed": 7}
    state = data.BatchSampler(**settings).state_dict()
    with pytest.raises(ValueError, match=name):
        data.BatchSampler(**{**settings, **other}).load_state_dict(state)


def test_damaged_state_is_refused():
    sampler = data.BatchSampler(TOKENS, 4, 8)
    for state in ({}, {**sampler.state_dict(), "draws": -1}, {**sampler.state_dict(), "draws": "2"}):
        with pytest.raises(ValueError, match="state has"):
            sampler.load_state_dict(state)


def test_sampler_refuses_bad_arguments(tmp_path):
    np.save(tmp_path / "t.npy", TOKENS[:8])
    with pytest.raises(ValueError, match=r"t\.npy holds 8 tokens"):
        data.BatchSampler(data.load_tokens(tmp_path / "t.npy"), 1, 8)
    for wrong in (
        {"batch_size": 0},
        {"context_length": 0},
        {"micro_batches": 0},
        {"seed": -1},
        {"rank": 2, "world_size": 2},
        {"rank": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            data.BatchSampler(**{"tokens": TOKENS, "batch_size": 1, "context_length": 8, **wrong})


def test_sequential_batches_cover_the_tokens_once():
    batches = list(data.sequential_batches(np.arange(51), 4, 5))
    assert [inputs.shape for inputs, _ in batches] == [(4, 5), (4, 5), (2, 5)]
    assert np.concatenate([inputs.ravel() for inputs, _ in batches]).tolist() == list(range(50))
    assert np.concatenate([targets.ravel() for _, targets in batches]).tolist() == list(range(1, 51))
    assert len(list(data.sequential_batches(np.arange(50), 4, 5))[-1][0]) == 1  # 9 windows: the last has no target


def test_sequential_batches_are_spread_when_they_are_fewer():
    batches = list(data.sequential_batches(np.arange(1001), 2, 10, max_batches=5))
    assert [inputs.shape for inputs, _ in batches] == [(2, 10)] * 5
    assert [int(start) for inputs, _ in batches for start in inputs[:, 0]] == list(range(0, 1000, 100))
    assert same(batches, list(data.sequential_batches(np.arange(1001), 2, 10, max_batches=5)))
    with pytest.raises(ValueError, match="too few"):
        data.sequential_batches(np.arange(10), 2, 10)


# --- In memory, and by rank -----------------------------------------------------------------------


def test_random_tokens():
    dataset = data.RandomTokenDataset(1000, 50, seed=1)
    assert len(dataset) == 1000 and dataset.tokens.dtype == np.uint16
    assert dataset.tokens.min() == 0 and dataset.tokens.max() == 49
    assert np.array_equal(dataset.tokens, data.RandomTokenDataset(1000, 50, seed=1).tokens)
    assert data.RandomTokenDataset(10, 2**16).tokens.dtype == np.uint16
    assert data.RandomTokenDataset(10, 2**16 + 1).tokens.dtype == np.uint32
    for wrong in ((0, 10), (10, 0)):
        with pytest.raises(ValueError, match="must be"):
            data.RandomTokenDataset(*wrong)


def test_text_file_dataset(tmp_path, text, tokenizer):
    dataset = data.TextFileDataset(text, tokenizer, num_workers=1)
    assert dataset.tokens.tolist() == tokenizer.encode(text.read_text(encoding="utf-8"))
    assert len(dataset) == len(dataset.tokens) and dataset.tokens.dtype == tokenizer.token_dtype
    (tmp_path / "short.txt").write_text("the cat")
    with pytest.raises(ValueError, match=r"short\.txt holds .* too few for one context of 64"):
        data.TextFileDataset(tmp_path / "short.txt", tokenizer, context_length=64)
    with pytest.raises(ValueError, match=r"gone\.txt"):
        data.TextFileDataset(tmp_path / "gone.txt", tokenizer)
