"""Corpora, token files and batches: from a `dataset_mode` to the arrays that training reads.

text --prepare_corpus--> train.txt, valid.txt --tokenize_to_npy--> train.npy, valid.npy --BatchSampler--> batches

A token file is a 1-D `.npy` of uint16 or uint32 ids, opened as a read-only memory map, so its size is not bounded by
memory. TinyStories is Eldan and Li 2023 (arXiv:2305.07759), read from the Hugging Face hub with `datasets`. Every file
is written beside its name and moved there when it is whole. B batch size, T context length.
"""

from __future__ import annotations

import codecs
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from lmsys import records
from lmsys.config import END_OF_TEXT, DataConfig, require
from lmsys.data import stories

if TYPE_CHECKING:
    from lmsys.data.tokenizer import Tokenizer

TINYSTORIES = "roneneldan/TinyStories"
PROBE_SECONDS = 5.0  # how long auto waits for the hub before it takes the stories
AUTO_STORIES_MB = 5.0  # what auto generates where text_mb is null, which stands for all of TinyStories

_CHUNK_BYTES = 1 << 22
_SCAN_TOKENS = 1 << 22
_OTHER_MODES = "use dataset_mode 'stories' (generated here), 'local_text' (your text) or 'local_npy' (token files)"


@dataclass(frozen=True)
class Corpus:
    """What a dataset_mode came to: texts to tokenize, or token files."""

    mode: str
    reason: str
    train_text: Path | None = None
    valid_text: Path | None = None
    train_tokens: Path | None = None
    valid_tokens: Path | None = None


# --- Which corpus ---------------------------------------------------------------------------------


def find_input(path: str | Path) -> Path | None:
    """The file that a setting names: tried from the working directory, then from the repository; None if in neither."""
    return next((place for place in _places(path) if place.is_file()), None)


def _places(path: str | Path) -> list[Path]:
    path = Path(path).expanduser()
    return list(dict.fromkeys((path.absolute(), records.REPOSITORY / path)))


def input_file(path: str | Path, setting: str) -> Path:
    """The file that a setting names, see find_input; ValueError where it is missing or empty."""
    file = find_input(path)
    require(file is not None, f"{setting}: no file '{path}' (looked for {' and '.join(map(str, _places(path)))})")
    require(file.stat().st_size > 0, f"{setting}: {file} is empty")
    return file


def choose_mode(config: DataConfig) -> tuple[str, str]:
    """The dataset mode to take and, in one sentence, why.

    `auto` takes token files if both are there, else the configured text if it is there, else TinyStories if the hub
    answers within PROBE_SECONDS, else stories. A mode that is asked for by name is taken as it is. ValueError: its
    input is missing or empty.
    """
    mode, text = config.dataset_mode, config.text_path
    if mode == "local_npy":
        _token_inputs(config)
    if mode == "local_text":
        _text_inputs(config)
    if mode != "auto":
        return mode, f"dataset_mode is '{mode}'"

    token_paths = [path for path in (config.train_tokens_path, config.valid_tokens_path) if path is not None]
    missing = [path for path in token_paths if find_input(path) is None]
    if missing:
        reason = f"dataset_mode is 'auto', there is no token file {' or '.join(missing)}"
    elif len(token_paths) == 2:
        return "local_npy", f"dataset_mode is 'auto' and the token files {' and '.join(token_paths)} are there"
    elif token_paths:
        reason = f"dataset_mode is 'auto', {token_paths[0]} is only one of the two token files"
    else:
        reason = "dataset_mode is 'auto', no token files are configured"
    if text is not None and find_input(text) is not None:
        _text_inputs(config)
        return "local_text", f"{reason} and the text {text} is there"
    reason += ", no text is configured" if text is None else f", there is no text {text}"
    unreachable = tinystories_unreachable()
    if unreachable is None:
        return "tinystories", f"{reason} and TinyStories can be reached"
    return "stories", f"{reason} and TinyStories cannot be reached ({unreachable})"


def _token_inputs(config: DataConfig) -> tuple[Path, Path]:
    train, valid = config.train_tokens_path, config.valid_tokens_path
    return input_file(train, "data.train_tokens_path"), input_file(valid, "data.valid_tokens_path")


def _text_inputs(config: DataConfig) -> tuple[Path, Path | None]:
    valid = config.valid_text_path
    return input_file(config.text_path, "data.text_path"), valid and input_file(valid, "data.valid_text_path")


def tinystories_unreachable(timeout_s: float = PROBE_SECONDS) -> str | None:
    """Why TinyStories cannot be reached, or None if the hub answers for it within timeout_s seconds."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name} is set"
    answer: list[str | None] = [f"no answer within {timeout_s:g} seconds"]

    def ask() -> None:
        try:
            from huggingface_hub import HfApi

            HfApi().dataset_info(TINYSTORIES, timeout=timeout_s)
            answer.append(None)
        except Exception as error:  # whatever stands between here and the hub is the answer to the question
            answer.append(_first_line(error))

    # A thread, because the client's timeout bounds neither name resolution nor the sum over several addresses.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answer[-1]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)


# --- Making it ------------------------------------------------------------------------------------


def prepare_corpus(config: DataConfig, folder: str | Path, *, progress: bool = True) -> Corpus:
    """Make the texts of the configured corpus, or check the token files that it names.

    stories, tinystories, and a local_text without valid_text_path write folder/train.txt and folder/valid.txt, both or
    neither; a local_text with valid_text_path is used where it lies. progress: show a bar for the download.

    Raises:
        ValueError: a missing, empty or non-UTF-8 text, a text too short to split, a bad token file.
        OSError: TinyStories cannot be reached; the folder cannot be written or the disk is full.
    """
    folder = Path(folder)
    mode, reason = choose_mode(config)
    if mode == "local_npy":
        train, valid = _token_inputs(config)
        load_tokens(train)
        load_tokens(valid)
        return Corpus(mode, reason, train_tokens=train, valid_tokens=valid)
    train, valid = folder / "train.txt", folder / "valid.txt"
    if mode == "local_text":
        text, valid_text = _text_inputs(config)
        check_text(text)
        if valid_text is None:
            _split_text(text, train, valid, config.valid_fraction)
        else:
            check_text(valid_text)
            train, valid = text, valid_text
    elif mode == "tinystories":
        _download_tinystories(config, train, valid, progress)
    else:
        size_mb = AUTO_STORIES_MB if config.text_mb is None else config.text_mb
        whole = folder / f".stories.{os.getpid()}.tmp"
        try:
            with records.naming(train):
                stories.generate(whole, size_mb, config.seed)
            _split_text(whole, train, valid, config.valid_fraction)
        finally:
            whole.unlink(missing_ok=True)
    return Corpus(mode, reason, train_text=train, valid_text=valid)


def check_text(path: str | Path) -> int:
    """The size in bytes of a text file. ValueError: missing, empty or only white space, or not UTF-8."""
    path = Path(path)
    require(path.is_file(), f"no text file at {path}")
    blank, offset, chunk = True, 0, b"-"
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        while chunk:
            chunk, pending = file.read(_CHUNK_BYTES), len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                at = offset - pending + error.start
                raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {at}; convert it to UTF-8") from None
            blank = blank and not text.strip()
            offset += len(chunk)
    require(not blank, f"{path} holds only white space" if offset else f"{path} is empty")
    return offset


def _split_text(text: Path, train: Path, valid: Path, valid_fraction: float) -> None:
    """Hold out about the last valid_fraction of a text, cut after a document, else a line, else a character."""
    size = text.stat().st_size
    with text.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as view:
        cut = _cut_before_end(view, size, valid_fraction)
        # A part that starts or ends with 4 MiB of white space is not looked through further.
        parts = view[max(0, cut - _CHUNK_BYTES) : cut], view[cut : cut + _CHUNK_BYTES]
        require(
            all(part.strip() for part in parts),
            f"{text} is too short to hold out data.valid_fraction {valid_fraction:g} of its {size} bytes; "
            "give more text, or data.valid_text_path",
        )
        with records.atomic_path(train) as train_temporary, records.atomic_path(valid) as valid_temporary:
            for path, temporary, start, end in ((train, train_temporary, 0, cut), (valid, valid_temporary, cut, size)):
                with records.naming(path), temporary.open("wb") as out:
                    for at in range(start, end, _CHUNK_BYTES):
                        out.write(view[at : min(at + _CHUNK_BYTES, end)])


def _cut_before_end(view: mmap.mmap, size: int, valid_fraction: float) -> int:
    """Where to cut, searched for where the part after it is a half to twice valid_fraction."""
    held_out = size * valid_fraction
    wanted = size - round(held_out)
    least, most = max(0, size - round(2 * held_out)), size - round(held_out / 2)
    for mark in (END_OF_TEXT.encode(), b"\n"):
        before, after = view.rfind(mark, least, wanted), view.find(mark, wanted, most)
        ends = [at + len(mark) for at in (before, after) if at >= 0]
        if ends:
            cut = min(ends, key=lambda end: abs(end - wanted))
            return cut + 1 if view[cut : cut + 1] == b"\n" and mark != b"\n" else cut
    while wanted < size and view[wanted] & 0xC0 == 0x80:  # a continuation byte
        wanted += 1
    return wanted


def _download_tinystories(config: DataConfig, train: Path, valid: Path, progress: bool) -> None:
    """Stream both splits to text: text_mb in all, valid_fraction of it validation; text_mb None: everything."""
    unreachable = tinystories_unreachable()
    if unreachable is not None:
        raise OSError(f"TinyStories cannot be reached ({unreachable}); {_OTHER_MODES}")
    share = config.valid_fraction
    with records.atomic_path(train) as train_temporary, records.atomic_path(valid) as valid_temporary:
        for split, fraction, path, temporary in (
            ("validation", share, valid, valid_temporary),
            ("train", 1 - share, train, train_temporary),
        ):
            written, limit = 0, None if config.text_mb is None else round(config.text_mb * 1e6 * fraction)
            with (
                records.naming(path),
                temporary.open("wb") as out,
                _bar(limit, f"TinyStories {split}", progress) as bar,
                closing(_stream_tinystories(split)) as texts,
            ):
                for text in texts:
                    size = out.write(f"{text.strip()}\n{END_OF_TEXT}\n".encode())
                    written += size
                    bar.update(size)
                    if limit is not None and written >= limit:
                        break
            require(written > 0, f"TinyStories' split '{split}' came without a story; {_OTHER_MODES}")


def _stream_tinystories(split: str) -> Iterator[str]:
    """The non-empty texts of a split. A failure of the download becomes an OSError."""
    try:
        from datasets import load_dataset

        for row in load_dataset(TINYSTORIES, split=split, streaming=True):
            if row["text"].strip():
                yield row["text"]
    except Exception as error:  # the hub, its client and the parquet reader each have their own
        what = f"the download of TinyStories' split '{split}' broke off ({_first_line(error)})"
        raise OSError(f"{what}; try again, or {_OTHER_MODES}") from error


def _bar(total: int | None, what: str, progress: bool) -> tqdm:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not progress)


# --- Token files ----------------------------------------------------------------------------------


def tokenize_to_npy(
    text_path: str | Path,
    tokenizer: Tokenizer,
    out_path: str | Path,
    *,
    num_workers: int | None = None,
    progress: bool = True,
) -> int:
    """Tokenize a UTF-8 text into a 1-D .npy of tokenizer.token_dtype; returns the number of tokens.

    Chunks are encoded in parallel processes and appended in file order, so memory does not grow with the file; the
    number of tokens goes into the header last. (Appended and not stored through a writable map: on a full disk that
    would be a SIGBUS, and this is an OSError.)

    Raises:
        ValueError: the text is missing, empty or not UTF-8. OSError: out_path cannot be written.
    """
    size = check_text(text_path)
    dtype, count = np.dtype(tokenizer.token_dtype), 0
    with (
        records.atomic_path(out_path) as temporary,
        temporary.open("wb") as out,
        _bar(size, f"tokenize {Path(text_path).name}", progress) as bar,
        closing(tokenizer.encode_file_chunks(text_path, num_workers=num_workers)) as chunks,
    ):
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (0,)}
        np.lib.format.write_array_header_1_0(out, header)
        start = out.tell()
        for ids, consumed in chunks:
            out.write(np.ascontiguousarray(ids, dtype=dtype).data)
            count += len(ids)
            bar.update(consumed)
        out.seek(0)
        np.lib.format.write_array_header_1_0(out, header | {"shape": (count,)})
        assert out.tell() == start  # NumPy pads a header so that its first axis can grow in place
    return count


def load_tokens(path: str | Path, *, vocab_size: int | None = None, context_length: int | None = None) -> np.ndarray:
    """A token file as a read-only memory map, shape (tokens,), uint16 or uint32; ValueError where it is not a good one.

    vocab_size: if given, the file is scanned once and every id must be below it.
    context_length: if given, the file must hold at least one context and the token after it.
    """
    path = Path(path)
    require(path.is_file(), f"no token file at {path}")
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a header is read as Python source: a damaged one fails in any way that source can
        raise ValueError(f"{path} is not a whole .npy token file: {_first_line(error)}") from None
    require(isinstance(tokens, np.memmap), f"{path} is an archive of arrays (.npz); a token file is one 1-D .npy array")
    what = f"{path} holds {tokens.dtype} of shape {tokens.shape}"
    fits = tokens.ndim == 1 and tokens.dtype in (np.uint16, np.uint32)
    require(fits, f"{what}; token files are 1-D, uint16 or uint32")
    extra = path.stat().st_size - tokens.offset - tokens.nbytes
    require(extra == 0, f"{path} is damaged: {extra} bytes follow the {len(tokens)} tokens that its header states")
    _check_length(tokens, context_length, path)
    if vocab_size is not None:
        largest = max(int(tokens[at : at + _SCAN_TOKENS].max()) for at in range(0, len(tokens), _SCAN_TOKENS))
        require(
            largest < vocab_size,
            f"{path} holds token id {largest}, beyond the vocabulary of {vocab_size}: "
            "was it made with another tokenizer? Tokenize again, or raise model.vocab_size",
        )
    return tokens


def _check_length(tokens: np.ndarray, context_length: int | None, source: str | Path | None = None) -> None:
    source = source or getattr(tokens, "filename", None) or "the token array"
    require(len(tokens) > 0, f"{source} holds no tokens")
    require(
        context_length is None or len(tokens) > context_length,
        f"{source} holds {len(tokens)} tokens, too few for one context of {context_length} and the token after it; "
        "give more text, or a smaller context_length",
    )


# --- Batches --------------------------------------------------------------------------------------


def _windows(tokens: np.ndarray, starts: Iterable[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
    return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])


class BatchSampler:
    """Seeded random windows of a token array, the same whatever the number of processes and micro-batches.

    Draw number n takes micro_batches * world_size * batch_size window starts from a generator seeded with (seed, n).
    They are cut into blocks of batch_size, and micro-batch m of rank r is block m * world_size + r: together, the ranks
    and micro-batches of a draw see what one process with the whole batch would. The state is n.

    Args:
        tokens: shape (tokens,), any integer dtype. batch_size: B, windows a micro-batch and rank. context_length: T.
        micro_batches: calls of next() that share a draw, for gradient accumulation.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        batch_size: int,
        context_length: int,
        *,
        micro_batches: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        sizes = {"batch_size": batch_size, "context_length": context_length, "micro_batches": micro_batches}
        for name, size in sizes.items():
            require(size >= 1, f"{name} is {size}; it must be at least 1")
        require(seed >= 0, f"the sampler's seed is {seed}; it must be 0 or more")
        require(0 <= rank < world_size, f"rank {rank} is not one of the {world_size} ranks 0 to world_size - 1")
        _check_length(tokens, context_length)
        self.tokens, self.batch_size, self.context_length = tokens, batch_size, context_length
        self.micro_batches, self.seed, self.rank, self.world_size = micro_batches, seed, rank, world_size
        self.draws = 0
        self._blocks: list[np.ndarray] = []  # of this rank and draw, what next() has still to give, the last first

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets), int64, shape (B, T) each; targets are inputs one token later."""
        if not self._blocks:
            generator = np.random.default_rng((self.seed, self.draws))
            shape = self.micro_batches, self.world_size, self.batch_size
            blocks = generator.integers(len(self.tokens) - self.context_length, size=shape)
            self._blocks = list(blocks[::-1, self.rank])
            self.draws += 1
        return _windows(self.tokens, self._blocks.pop(), self.context_length)

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "global_batch_size": self.micro_batches * self.world_size * self.batch_size,
            "context_length": self.context_length,
            "num_tokens": len(self.tokens),
        }

    def state_dict(self) -> dict[str, int]:
        """Everything that the next draws depend on, JSON-ready; the same on every rank. Between draws only."""
        assert not self._blocks, "a state is taken after the last micro-batch of a draw"
        return {**self._identity(), "draws": self.draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the draws of a state. ValueError where it is of another seed, batch, context or token file."""
        for name, value in self._identity().items():
            require(
                state.get(name) == value,
                f"the sampler's state has {name} {state.get(name)} and this run has {value}: it cannot continue "
                "exactly; keep the setting, or start a new run",
            )
        draws = state.get("draws")
        require(isinstance(draws, int) and draws >= 0, f"the sampler's state has draws {draws!r}; expected 0 or more")
        self.draws, self._blocks = draws, []


def sequential_batches(
    tokens: np.ndarray, batch_size: int, context_length: int, max_batches: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Fixed batches for evaluation: non-overlapping windows in order, as (inputs, targets) int64 of shape (<=B, T).

    All windows from the start, or max_batches * B of them spread evenly over the array where it has more. Only the
    last batch can be smaller than B, and only where every window is used.
    """
    _check_length(tokens, context_length)
    total = (len(tokens) - 1) // context_length
    wanted = total if max_batches is None else min(total, max_batches * batch_size)
    starts = (np.arange(wanted) * total // wanted * context_length).tolist() if wanted else []
    return (
        _windows(tokens, starts[first : first + batch_size], context_length) for first in range(0, wanted, batch_size)
    )


# --- In memory ----------------------------------------------------------------------------------


class RandomTokenDataset:
    """Uniform random token ids in memory, for benchmarks: `.tokens` has shape (num_tokens,)."""

    def __init__(self, num_tokens: int, vocab_size: int, seed: int = 0):
        require(num_tokens >= 1, f"num_tokens is {num_tokens}; it must be at least 1")
        require(1 <= vocab_size <= 2**32, f"vocab_size is {vocab_size}; it must be between 1 and 2**32")
        dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
        self.vocab_size = vocab_size
        self.tokens = np.random.default_rng(seed).integers(vocab_size, size=num_tokens, dtype=dtype)

    def __len__(self) -> int:
        return len(self.tokens)


class TextFileDataset:
    """The tokens of a UTF-8 text file, in memory: `.tokens` has shape (tokens,) and tokenizer.token_dtype.

    ValueError: the file is missing, empty, not UTF-8, or has fewer than context_length + 1 tokens.
    """

    def __init__(self, path: str | Path, tokenizer: Tokenizer, *, context_length=None, num_workers=None):
        check_text(path)
        chunks = tokenizer.encode_file_chunks(path, num_workers=num_workers)
        self.vocab_size = tokenizer.vocab_size
        self.tokens = np.concatenate([ids for ids, _ in chunks]).astype(tokenizer.token_dtype, copy=False)
        _check_length(self.tokens, context_length, path)

    def __len__(self) -> int:
        return len(self.tokens)
