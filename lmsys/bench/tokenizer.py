"""The tokenizer benchmark: training and encoding beside `tokenizers` and `tiktoken`, on one text in one run.

Each sample has a fresh process, so all caches start cold; rounds of samples take turns, so that a busy machine slows
all alike. The timed region of training is from the file to vocabulary and merges; of encoding, from what the
implementation takes (ours the file, the others a string or documents in memory) to token ids in memory. All encoders
get the vocabulary that ours trained, and the ids must be equal. tiktoken is measured in the ways that it offers:
`encode` (one thread, lists), `encode_batch` (threads, documents to lists) and `encode_to_numpy` (threads, megabytes to
arrays); `tokenizers` trains from the file, and encodes with `encode_batch_fast` over documents, on its own threads.

Peak memory is of the whole process and its children, pages that they share counted once (PSS), sampled from outside
every 50 ms; only Linux tells it. Where a text is held in memory, it is in there.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lmsys import data
from lmsys.bench.experiment import Experiment, Notebook, Parameters, Point, Row, require_numbers
from lmsys.config import END_OF_TEXT, require
from lmsys.data.bpe import train_bpe
from lmsys.data.pretokens import PRETOKEN, find_chunk_boundaries
from lmsys.data.tokenizer import Tokenizer

_GROWTH = 4  # ours also trains on the text this many times over: memory must not follow
_SAMPLE_INTERVAL_S = 0.05
_ENCODERS = ("lmsys", "tiktoken encode", "tiktoken encode_batch", "tiktoken encode_to_numpy", "tokenizers")


def write_text(path: str | Path, text_mb: float, *, seed: int = 0) -> Path:
    """Write about text_mb (1e6 bytes) of text with the statistics of English: documents between end-of-text tokens,
    sentences and punctuation, and 60,000 words, the common ones English and shorter than the rare. A word's frequency
    falls with its rank r as in English: as 1/r among the first 5,000, then as 1/r^2 (Ferrer i Cancho and Sole, 2001).
    """
    rng = random.Random(seed)
    given = json.loads(Path(data.__file__).with_name("benchmark_words.json").read_text(encoding="utf-8"))
    common, onsets, vowels, codas, endings = given.values()
    words = dict.fromkeys(common)
    while len(words) < 60_000:
        syllables = rng.choices((1, 2, 3), (4, 5, 2))[0]
        stem = "".join(rng.choice(onsets) + rng.choice(vowels) for _ in range(syllables)) + rng.choice(codas)
        words[stem + rng.choice(endings)] = None
    words = [*common, *sorted(list(words)[len(common) :], key=lambda word: len(word) + rng.gauss(0, 2))]
    weights = list(accumulate(1 / (rank + 2.7) * min(1, 5000 / (rank + 1)) for rank in range(len(words))))
    size = 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        while size < text_mb * 1e6:
            document = "\n\n".join(_paragraph(rng, words, weights) for _ in range(rng.randint(1, 8)))
            size += file.write(f"{document}\n{END_OF_TEXT}\n")
    return Path(path)


def _paragraph(rng: random.Random, words: Sequence[str], weights: Sequence[float]) -> str:
    sentences = []
    for _ in range(rng.randint(2, 8)):
        sentence = rng.choices(words, cum_weights=weights, k=rng.randint(4, 24))
        sentence[0] = sentence[0].capitalize()
        kind = rng.random()
        place = rng.randrange(len(sentence))
        if kind < 0.4:
            sentence[place] += ","
        elif kind < 0.5:
            sentence[place] = str(rng.randint(1, 2000))
        elif kind < 0.6:
            sentence[place] += rng.choice(("'s", "n't", "'ll", "-" + sentence[0].lower()))
        elif kind < 0.7:
            sentence[place] = sentence[place].capitalize()
        end = rng.choices(".?!", (8, 1, 1))[0]
        sentences.append(f'"{" ".join(sentence)}{end}"' if kind > 0.92 else " ".join(sentence) + end)
    return " ".join(sentences)


def check(p: Parameters) -> None:
    """Raises ValueError: a number out of range, or a text that is not there."""
    wanted = "at least 257: 256 bytes and the special token"
    require(p.vocab_size >= 257, f"vocab_size is {p.vocab_size}; it takes {wanted}")
    require_numbers(p, {"repeats": 1, "workers": 1})
    require(p.encode_mb > 0, f"encode_mb is {p.encode_mb}; it must be positive")
    require(p.text is None or Path(p.text).is_file(), f"no text file at {p.text}; give --text a UTF-8 file")


NOTEBOOK = Notebook("tokenizer_benchmark", check)


def measure_point(point: Point, p: Parameters) -> list[Row]:
    """A row for each implementation of a task, their samples taking turns; encode checks that all ids are the same."""
    with tempfile.TemporaryDirectory(prefix="lmsys-tokenizer-") as name:
        folder = Path(name)
        text = Path(p.text) if p.text is not None else write_text(folder / "text.txt", p.text_mb, seed=p.seed)
        job = {"folder": name, "text": str(text), "vocab_size": p.vocab_size, "workers": p.workers, "task": "train"}
        ours = {**job, "implementation": "lmsys"}
        bounds = find_chunk_boundaries(text, chunk_bytes=int(p.encode_mb * 1e6), special_tokens=[END_OF_TEXT])
        if point["task"] == "train":
            larger = folder / "larger.txt"
            _copy(text, larger, bounds[-1], times=_GROWTH)
            sampled = _sample([ours, {**job, "implementation": "tokenizers"}], p.repeats)
            return [_row(*each) for each in (*sampled, *_sample([{**ours, "text": str(larger)}], 1))]
        trained = _in_process(ours)  # all encoders get its vocabulary
        require(trained["status"] == "ok", f"cannot train on {text}: {trained.get('note')}")
        part = folder / "part.txt"
        _copy(text, part, bounds[1])
        job |= {"task": "encode", "text": str(part)}
        sampled = _sample([{**job, "implementation": name} for name in _ENCODERS], p.repeats)
    rows = [_row(*each) for each in sampled]
    digest = sampled[0][1][0].get("digest")  # ours: the first encoder
    for row, (_, results) in zip(rows, sampled, strict=True):
        if row["status"] == "ok" and any(result["digest"] != digest for result in results):
            row |= {"status": "error", "note": "its ids are not those of lmsys"}
    return rows


BENCHMARK = Experiment(
    name="tokenizer_benchmark_results",
    columns=(
        *("implementation", "task", "workers", "vocab_size", "text_mb", "status"),
        *("seconds", "p20_s", "p80_s", "samples", "mb_per_s", "peak_mib", "tokens", "note"),
    ),
    points=lambda p: [{"task": task, "vocab_size": p.vocab_size} for task in ("train", "encode")],
    measure=measure_point,
    method=lambda p: {
        "timer": "time.perf_counter",
        "warmup": 0,
        "samples": p.repeats,
        "statistic": "median, 20th and 80th percentile",
        "memory": f"peak PSS of the process and its children, every {_SAMPLE_INTERVAL_S} s",
    },
)


def _copy(source: Path, target: Path, size: int, times: int = 1) -> None:
    """Write the first size bytes of a file, several times over."""
    with open(source, "rb") as file:
        content = file.read(size)
    with open(target, "wb") as file:
        file.writelines(content for _ in range(times))


def _sample(jobs: Sequence[dict[str, Any]], repeats: int) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each job in `repeats` fresh processes, the jobs taking turns."""
    rounds = [[_in_process(job) for job in jobs] for _ in range(repeats)]
    return list(zip(jobs, map(list, zip(*rounds, strict=True)), strict=True))


def _in_process(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a fresh interpreter, watching its memory."""
    environment = {**os.environ, "RAYON_NUM_THREADS": str(job["workers"]), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-m", "lmsys.bench.tokenizer", json.dumps(job)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment, **pipes, text=True, encoding="utf-8")
    peak = 0
    while process.poll() is None:
        peak = max(peak, _pss_bytes(process.pid))
        time.sleep(_SAMPLE_INTERVAL_S)
    output, errors = process.communicate()
    if process.returncode:
        return {"status": "error", "note": (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]}
    return {**json.loads(output), "peak_mib": peak / 2**20 or None}


def _pss_bytes(pid: int) -> int:
    """Proportional set size of a process and its descendants; 0 where the system does not tell."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended, or this is not Linux
        return 0
    own = next((int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return own + sum(_pss_bytes(int(child)) for child in children)


def _row(job: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The row of a job from its samples."""
    row = {"implementation": job["implementation"], "workers": job["workers"]}
    bad = next((result for result in results if result["status"] != "ok"), None)
    if bad:
        return row | {"status": bad["status"], "note": bad["note"]}
    median, p20, p80 = np.quantile([result["seconds"] for result in results], (0.5, 0.2, 0.8)).tolist()
    first = results[0]
    row |= {"status": "ok", "seconds": median, "p20_s": p20, "p80_s": p80, "samples": len(results)}
    row |= {name: first[name] for name in ("workers", "text_mb", "tokens")} | {"mb_per_s": first["text_mb"] / median}
    peaks = [result["peak_mib"] for result in results if result["peak_mib"] is not None]
    return row | {"peak_mib": max(peaks, default=None), "note": ""}


# --- In the fresh process ---------------------------------------------------------------------------


def _main(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job. Returns its seconds, the number of tokens, and for encoding a digest of the ids."""
    try:
        work, finish = _WORK[job["task"], job["implementation"].split()[0]](job)
    except ImportError as error:
        return {"status": "unsupported", "note": f"{error.name} is not installed"}
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    done = {"status": "ok", "seconds": seconds, "text_mb": os.path.getsize(job["text"]) / 1e6, **job, **finish(result)}
    return {key: done.get(key) for key in ("status", "seconds", "text_mb", "workers", "tokens", "digest")}


Work = tuple[Callable[[], Any], Callable[[Any], dict[str, Any]]]  # what is timed, and what is made of its result


def _train_lmsys(job: Mapping[str, Any]) -> Work:
    def work():
        return train_bpe(job["text"], job["vocab_size"], [END_OF_TEXT], num_workers=job["workers"])

    def finish(result):
        tokenizer = Tokenizer(*result, [END_OF_TEXT])
        tokenizer.save(Path(job["folder"], "lmsys.json"))
        tokenizer.export_huggingface(Path(job["folder"], "tokenizer.json"))
        return {"tokens": len(tokenizer.vocab)}

    return work, finish


def _train_tokenizers(job: Mapping[str, Any]) -> Work:
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=job["vocab_size"],
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return lambda: tokenizer.train([job["text"]], trainer), lambda _: {"tokens": tokenizer.get_vocab_size()}


def _encode_lmsys(job: Mapping[str, Any]) -> Work:
    tokenizer = Tokenizer.load(Path(job["folder"], "lmsys.json"))

    def work():
        return [ids for ids, _ in tokenizer.encode_file_chunks(job["text"], num_workers=job["workers"])]

    return work, _digest


def _encode_tiktoken(job: Mapping[str, Any]) -> Work:
    import tiktoken

    ours = Tokenizer.load(Path(job["folder"], "lmsys.json"))
    special = {token: ours.token_id(token) for token in ours.special_tokens}
    ranks = {token: index for index, token in ours.vocab.items() if index not in special.values()}
    encoding = tiktoken.Encoding("lmsys", pat_str=PRETOKEN.pattern, mergeable_ranks=ranks, special_tokens=special)
    text = _read(job["text"])
    workers, how = job["workers"], job["implementation"].split()[1]
    if how == "encode":
        return lambda: [encoding.encode(text, allowed_special="all")], lambda ids: {**_digest(ids), "workers": 1}
    if how == "encode_batch":
        documents = _documents(text)
        return lambda: encoding.encode_batch(documents, num_threads=workers, allowed_special="all"), _digest
    bounds = find_chunk_boundaries(job["text"], special_tokens=[END_OF_TEXT])
    data = text.encode()
    parts = [data[start:end].decode() for start, end in pairwise(bounds)]

    def work():
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(lambda part: encoding.encode_to_numpy(part, allowed_special="all"), parts))

    return work, _digest


def _encode_tokenizers(job: Mapping[str, Any]) -> Work:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(Path(job["folder"], "tokenizer.json")))
    documents = _documents(_read(job["text"]))
    return lambda: tokenizer.encode_batch_fast(documents), lambda encoded: _digest([e.ids for e in encoded])


_WORK = {
    ("train", "lmsys"): _train_lmsys,
    ("train", "tokenizers"): _train_tokenizers,
    ("encode", "lmsys"): _encode_lmsys,
    ("encode", "tiktoken"): _encode_tiktoken,
    ("encode", "tokenizers"): _encode_tokenizers,
}


def _read(path: str | Path) -> str:
    return Path(path).read_bytes().decode("utf-8")


def _documents(text: str) -> list[str]:
    """The text's documents, each with the end-of-text token that ends it."""
    return [document for document in re.split(f"(?<={re.escape(END_OF_TEXT)})", text) if document]


def _digest(parts: Iterable[Any]) -> dict[str, Any]:
    digest, tokens = hashlib.sha256(), 0
    for part in parts:
        ids = np.asarray(part, np.uint32)
        digest.update(ids.tobytes())
        tokens += len(ids)
    return {"digest": digest.hexdigest(), "tokens": tokens}


if __name__ == "__main__":
    print(json.dumps(_main(json.loads(sys.argv[1]))))
