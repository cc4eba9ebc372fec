"""The stages before training: text -> tokenizer -> token files, each skipped where its outputs are there and match."""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmsys import config as cfg
from lmsys import records
from lmsys.config import PipelineConfig, require
from lmsys.data.corpora import find_input, input_file, load_tokens, prepare_corpus, tokenize_to_npy
from lmsys.data.tokenizer import Tokenizer

Report = Callable[[str, str, float, str], None]  # (stage, ran or skipped, time.perf_counter at its start, detail)
# (tokenizer, training tokens, validation tokens, bytes a token)
Prepared = tuple[Tokenizer | None, np.ndarray, np.ndarray, float | None]


class Stages:
    """stages.json of a run folder: for each stage the settings that its outputs came from, and their state.

    frozen: the folder has checkpoints that training will continue. A stage whose settings changed is then refused
    before it writes over what those checkpoints were trained with; one whose outputs are lost is made again, the same.
    """

    def __init__(self, run_dir: Path, report: Report, *, frozen: bool):
        self.run_dir, self.report, self.frozen = run_dir, report, frozen
        self.file = run_dir / "stages.json"
        self.done: dict[str, Any] = {}
        if self.file.is_file():
            try:
                self.done = json.loads(self.file.read_text(encoding="utf-8"))
            except ValueError:
                self.report("stages", "ran", time.perf_counter(), f"{self.file} is damaged: every stage runs again")

    def run(
        self, name: str, settings: dict[str, Any], outputs: Callable[[], Sequence[Path]], make: Callable[[], str]
    ) -> str:
        """Run make() unless the stage's outputs are there and match; return a key of this state for those after it."""
        start = time.perf_counter()
        settings = json.loads(json.dumps(settings))
        earlier = self.done.get(name)
        matches = earlier is not None and earlier["settings"] == settings
        if matches and all(self._is_there(output) for output in earlier["outputs"]):
            self.report(name, "skipped", start, f"{earlier['detail']} (from an earlier run, settings unchanged)")
        else:
            require(
                matches or earlier is None or not self.frozen,
                f"the checkpoints in {self.run_dir} were trained with other settings of the stage '{name}' (or its "
                "input changed): restore those, give another run_dir, or train.resume=false to train anew",
            )
            detail = make()
            states = [self._state(path) | {"crc32": _crc32(path)} for path in outputs()]
            self.done[name] = {"settings": settings, "outputs": states, "detail": detail}
            records.write_json(self.file, self.done)
            self.report(name, "ran", start, detail)
        contents = [(output["path"], output["bytes"], output["crc32"]) for output in self.done[name]["outputs"]]
        return hashlib.sha256(json.dumps([settings, contents]).encode()).hexdigest()[:16]

    def _state(self, path: Path) -> dict[str, Any]:
        status = path.stat()
        return {"path": _relative(path, self.run_dir), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}

    def _is_there(self, output: dict[str, Any]) -> bool:
        path = self.run_dir / output["path"]
        return path.is_file() and self._state(path).items() <= output.items()


def prepare(config: PipelineConfig, run_dir: Path, stages: Stages, progress: bool) -> Prepared:
    """The stages data, tokenizer and tokens."""
    data, vocabulary = config.data, config.tokenizer
    options = {"num_workers": vocabulary.num_workers, "progress": progress}
    corpus_file, tokenizer_file = run_dir / "corpus.json", run_dir / "tokenizer.json"
    files = [run_dir / "train.npy", run_dir / "valid.npy"]

    def make_corpus() -> str:
        corpus = prepare_corpus(data, run_dir, progress=progress)
        # Files of the run folder are named relative to it, so that the folder can be moved.
        named = {
            key: _relative(value, run_dir) if isinstance(value, Path) else value for key, value in vars(corpus).items()
        }
        records.write_json(corpus_file, named)
        return f"{corpus.mode}: {corpus.reason}"

    def make_tokenizer() -> str:
        tokenizer, how = load_tokenizer(config), f"loaded from {vocabulary.path}"
        if tokenizer is None:
            size, special = vocabulary.vocab_size, vocabulary.special_tokens
            tokenizer, how = Tokenizer.train(texts[0], size, special, **options), f"trained on {texts[0].name}"
        tokenizer.save(tokenizer_file)
        return f"vocabulary of {tokenizer.vocab_size:,}, {how}"

    def make_tokens() -> str:
        train, valid = (
            tokenize_to_npy(text, tokenizer, out, **options) for text, out in zip(texts, files, strict=True)
        )
        return f"{train:,} training and {valid:,} validation tokens"

    paths = data.text_path, data.valid_text_path, data.train_tokens_path, data.valid_tokens_path
    inputs = {"data": cfg.to_dict(data), "inputs": [_input_state(path) for path in paths]}
    corpus_key = stages.run("data", inputs, lambda: [corpus_file, *filter(None, _texts(run_dir))], make_corpus)
    corpus, texts = json.loads(corpus_file.read_text(encoding="utf-8")), _texts(run_dir)
    if corpus["mode"] == "local_npy":
        files = [run_dir / corpus["train_tokens"], run_dir / corpus["valid_tokens"]]
        tokenizer = load_tokenizer(config)
    else:
        inputs = {"vocab_size": vocabulary.vocab_size, "special_tokens": list(vocabulary.special_tokens)}
        inputs |= {"path": _input_state(vocabulary.path), "corpus": corpus_key}
        key = stages.run("tokenizer", inputs, lambda: [tokenizer_file], make_tokenizer)
        tokenizer = Tokenizer.load(tokenizer_file)
        stages.run("tokens", {"tokenizer": key}, lambda: files, make_tokens)
    vocab_size = tokenizer.vocab_size if config.model.vocab_size is None else config.model.vocab_size
    tokens = [load_tokens(file, vocab_size=vocab_size, context_length=config.model.context_length) for file in files]
    return tokenizer, *tokens, _bytes_per_token(texts[1], tokens[1])


def load_tokenizer(config: PipelineConfig) -> Tokenizer | None:
    """The tokenizer that the setting tokenizer.path names; None where it names none."""
    path = config.tokenizer.path
    return Tokenizer.load(input_file(path, "tokenizer.path")) if path else None


def _texts(run_dir: Path) -> list[Path | None]:
    """The training and validation text that corpus.json, which the data stage wrote, names; None for token files."""
    corpus = json.loads((run_dir / "corpus.json").read_text(encoding="utf-8"))
    return [run_dir / corpus[key] if corpus[key] else None for key in ("train_text", "valid_text")]


def _bytes_per_token(text: Path | None, tokens) -> float | None:
    return text.stat().st_size / len(tokens) if text is not None and text.exists() else None


def existing(run_dir: Path, report: Report) -> Prepared:
    """The tokenizer and token files of the run folder as they are, for skip_data."""
    files = [run_dir / name for name in ("tokenizer.json", "train.npy", "valid.npy")]
    missing = [str(file) for file in files if not file.is_file()]
    require(not missing, f"skip_data takes what an earlier run left, but there is no {' and no '.join(missing)}")
    tokenizer = Tokenizer.load(files[0])
    tokens = [load_tokens(file, vocab_size=tokenizer.vocab_size) for file in files[1:]]
    report("data", "skipped", time.perf_counter(), f"skip_data: {len(tokens[0]):,} training tokens of an earlier run")
    text = _texts(run_dir)[1] if (run_dir / "corpus.json").is_file() else None
    return tokenizer, *tokens, _bytes_per_token(text, tokens[1])


def _input_state(path: str | Path | None) -> list[Any] | None:
    """What tells one state of an input from another: its path as given, size and CRC-32; None where there is none."""
    found = None if path is None else find_input(path)
    return None if found is None else [str(path), found.stat().st_size, _crc32(found)]


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            crc = zlib.crc32(chunk, crc)
    return crc


def _relative(path: Path, folder: Path) -> str:
    """The path relative to the folder where it lies in it, else as it is."""
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
