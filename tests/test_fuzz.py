"""Damaged and hostile inputs: configs, checkpoints and token files, mutated at random.

Each case ends in a clear error of one line (ValueError, OSError, FloatingPointError: what the command tells) or in a
correct run; never in another exception, in a hang, or with a changed file. Seeds are fixed: a failure names its case,
which can be run alone.
"""

import copy
import hashlib
import json
import random
import shutil
import signal
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import TOKENS, Interrupted, config, interrupt_at, one_thread, run  # noqa: F401

from lmsys import pipeline as pipelines
from lmsys.config import pipeline_config, to_dict
from lmsys.data import corpora, load_tokens
from lmsys.parallel import shards
from lmsys.parallel.shards import Piece
from lmsys.train import CHECKPOINTS, checkpoint, logged

TOLD = (ValueError, OSError, FloatingPointError)  # by the command, as one line
CASES = {"config text": 200, "config values": 300, "token files": 300, "checkpoints": 200, "sharded state": 100}
CASE_LIMIT_S = 60
# What stands in for a value of JSON.
HOSTILE = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        0.5,
        10**30,
        -(10**400),
        1e308,
        "",
        "x",
        "\x00",
        "../../outside",
        "/dev/null",
        "~",
        "1e999",
    ),
    *(
        [],
        {},
        [[]],
        ["a", 1],
        {"a": {"b": None}},
        "\ud800",
        "a" * 5000,
        float("nan"),
        float("inf"),
        2**63,
        "<|endoftext|>",
    ),
]


class Hang(BaseException):
    """A case that took too long."""


@pytest.fixture(autouse=True)
def limit():
    def hang(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, hang)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def ends_well(case: str, function) -> bool:
    """Call; True where it ran, False where it said what is wrong in a line. Anything else fails, naming the case."""
    signal.alarm(CASE_LIMIT_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function()
    except TOLD as error:
        message = str(error)
        assert message.strip(), f"{case}: {error!r} says nothing"
        assert len(" ".join(message.split())) < 3000, f"{case}: {message[:300]} ..."
        return False
    except BaseException as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
    return True


def state_of(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def scrambled(generator: random.Random, content: bytes) -> bytes:
    """Bytes with one of: a bit flipped, a byte replaced, a stretch cut out, doubled or moved, an end cut off."""
    result = bytearray(content)
    at = generator.randrange(len(result)) if result else 0
    length = min(generator.choice((1, 2, 7, 64, 1024)), len(result) - at)
    how = generator.randrange(7)
    if how == 0 and result:
        result[at] ^= 1 << generator.randrange(8)
    elif how == 1 and result:
        result[at] = generator.randrange(256)
    elif how == 2:
        del result[at : at + length]
    elif how == 3:
        result[at:at] = result[at : at + length]
    elif how == 4:
        result = result[:at]
    elif how == 5:
        result[at:at] = generator.choice(
            (b"\x00", b"\xff\xfe", b"{}", b"[" * 3000, b'"', b"-", b"9" * 5000, b"\x80cos\nsystem\n")
        )
    else:
        moved = result[at : at + length]
        del result[at : at + length]
        place = generator.randrange(len(result) + 1)
        result[place:place] = moved
    return bytes(result)


def places(value, path=()):
    """The paths of all values within a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


def changed(generator: random.Random, value):
    """A JSON value with one to three of its values replaced, removed or renamed, or an unknown one added."""
    value = copy.deepcopy(value)
    for _ in range(generator.randrange(1, 4)):
        path = generator.choice([path for path in places(value) if path])
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        how = generator.randrange(4)
        if how == 0 and isinstance(holder, dict):
            del holder[path[-1]]
        elif how == 1 and isinstance(holder, dict):
            holder[generator.choice(("extra", "", "__class__", path[-1] + "_"))] = holder.pop(path[-1])
        elif how == 2 and type(holder[path[-1]]) in (int, float):
            holder[path[-1]] = generator.choice((-1, 0, 0.5, 3, 10)) * holder[path[-1]] + generator.choice((-1, 0, 1))
        else:
            holder[path[-1]] = copy.deepcopy(generator.choice(HOSTILE))
        if not any(path for path in places(value)):
            return value
    return value


# --- Configs --------------------------------------------------------------------------------------


def check_config(file: Path) -> None:
    """What the command does with a config before any work: read, build, check."""
    made = pipelines.settings(config=file)
    assert pipeline_config(made.scale, file) == made
    pipelines.check(made)


def test_configs(tmp_path, output_root, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(corpora, "tinystories_unreachable", lambda *_: "not asked")
    monkeypatch.chdir(tmp_path)
    text = pipelines.DEFAULT_CONFIG.read_text()
    values = to_dict(pipeline_config("smoke", pipelines.DEFAULT_CONFIG))
    values["train"]["device"] = "cpu"
    values["run_dir"] = str(output_root / "run")
    (outside := tmp_path / "outside").mkdir()
    ran = 0
    for index in range(CASES["config text"] + CASES["config values"]):
        generator = random.Random(index)
        file = tmp_path / "config.json"
        if index < CASES["config text"]:
            file.write_bytes(scrambled(generator, text.encode()))
        else:
            file.write_text(json.dumps(changed(generator, values)))
        before = state_of(tmp_path)
        ran += ends_well(f"config {index}: {file.read_bytes()[:200]!r}", lambda file=file: check_config(file))
        assert state_of(tmp_path) == before, index
        assert not list(outside.iterdir()), index
    assert 30 < ran < 350  # some are harmless, most are not


@pytest.mark.parametrize("run_dir", ["../elsewhere", "runs/../../elsewhere", "", ".", "a/..", "runs\0x"])
def test_a_run_folder_stays_inside(run_dir):
    with pytest.raises(ValueError, match="run_dir is"):
        config_with(run_dir)
    assert config_with("runs/mine").run_dir == "runs/mine"
    assert config_with("/somewhere/else").run_dir == "/somewhere/else"  # an absolute path is meant


def config_with(run_dir: str):
    return pipeline_config("smoke", None, [], {"run_dir": run_dir})


# --- Token files ----------------------------------------------------------------------------------

HEADERS = [
    "{'descr': '<u2', 'fortran_order': False, 'shape': (%s,), }",
    "{'descr': '%s', 'fortran_order': False, 'shape': (500,), }",
    "{'descr': '<u2', 'fortran_order': %s, 'shape': (500,), }",
    "{'descr': '<u2', 'fortran_order': False, 'shape': %s, }",
    "%s",
]
HEADER_VALUES = [
    *(
        "0",
        "-1",
        "10**18",
        "99999999999999999999",
        "1e3",
        "None",
        "'500'",
        "True",
        "()",
        "((500,),)",
        "500",
        "(500,",
        "[500]",
    ),
    *(
        "<u4",
        "<i8",
        "|O",
        "<f4",
        ">u2",
        "|V2",
        "<M8[s]",
        "|S2",
        "<U99999999999",
        "__import__('os').mkdir('hacked')",
        "{}",
        "",
    ),
    *(
        "(250, 2)",
        "(2, 250)",
        "(-500,)",
        "(500, 0)",
        "(" * 150,
        "{'descr': '|O', 'fortran_order': False, 'shape': (500,), }",
    ),
]


def with_header(generator: random.Random, body: bytes) -> bytes:
    """A .npy file of any header: format NEP 1, version 1.0 or another."""
    header = (generator.choice(HEADERS) % generator.choice(HEADER_VALUES)).encode()
    header += b" " * (-(10 + len(header) + 1) % 64) + b"\n"
    version = generator.choice((b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"))
    length = struct.pack(
        "<H" if version[0] == 1 else "<I", len(header) + generator.choice((0, 0, 0, 1, -5, 60_000)) & 0xFFFF
    )
    return b"\x93NUMPY" + version + length + header + body


def test_token_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = tmp_path / "good.npy"
    np.save(good, TOKENS[:500])
    content = good.read_bytes()
    file = tmp_path / "tokens.npy"
    loaded = 0
    for index in range(CASES["token files"]):
        generator = random.Random(index)
        mutated = (
            scrambled(generator, content[:128]) + content[128:] if index % 4 == 0 else scrambled(generator, content)
        )
        file.write_bytes(with_header(generator, content[128:]) if index % 2 else mutated)
        before = state_of(tmp_path)

        def read() -> None:
            tokens = load_tokens(file, vocab_size=257, context_length=16)
            assert tokens.ndim == 1 and len(tokens) > 16 and int(tokens.max()) < 257
            run(tokens=tokens, train={"steps": 2})

        loaded += ends_well(f"tokens {index}: {file.read_bytes()[:150]!r}", read)
        assert state_of(tmp_path) == before, index
    assert 5 < loaded < CASES["token files"] // 2


# --- Checkpoints ----------------------------------------------------------------------------------


def sealed(folder: Path) -> None:
    """Make the checksums right again, as one would who changes a checkpoint on purpose."""
    names = ("model.safetensors", "optimizer.safetensors", "state.json")
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "checksums.json").write_text(json.dumps(sums))


def changed_safetensors(generator: random.Random, content: bytes) -> bytes:
    """A safetensors file with another header, whose length is right."""
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length]
    if generator.random() < 0.3:
        header = scrambled(generator, header)
    else:
        header = json.dumps(changed(generator, json.loads(header))).encode()
    size = len(header) if generator.random() < 0.9 else generator.choice((0, 2**40, 2**63, len(header) + 1))
    return struct.pack("<Q", size) + header + content[8 + length :]


@pytest.mark.parametrize("part", range(4))
def test_checkpoints(tmp_path, part):
    """A run goes on from its older checkpoint where the newest is damaged; what is sealed is told, or goes on."""
    settings = {"steps": 6, "checkpointing_interval": 2, "eval_interval": 0, "keep_checkpoints": 2, "dtype": "fp16"}
    settings |= {"log_interval": 1, "eval_batches": 1, "loss_spike": 50.0, "async_checkpoints": False}
    good = tmp_path / "good"
    with pytest.raises(Interrupted):
        run(good, on_step=interrupt_at(4), train=settings)
    expected = None
    folder = tmp_path / "run"
    ran = 0
    for index in range(part, CASES["checkpoints"], 4):
        generator = random.Random(index)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        newest = folder / CHECKPOINTS / "step-00000004"
        name = generator.choice(
            ("model.safetensors", "optimizer.safetensors", "state.json", "state.json", "checksums.json")
        )
        file, seal = newest / name, index % 5 != 0 and name != "checksums.json"
        content = file.read_bytes()
        if name.endswith(".json") and generator.random() < 0.8:
            file.write_text(json.dumps(changed(generator, json.loads(content))))
        elif name.endswith(".safetensors") and generator.random() < 0.7:
            file.write_bytes(changed_safetensors(generator, content))
        else:
            file.write_bytes(scrambled(generator, content))
        if seal:
            sealed(newest)
        before = state_of(folder / CHECKPOINTS)
        case = f"checkpoint {index}: {name}{' sealed' * seal}: {file.read_bytes()[:200]!r}"

        ends_well(f"{case}, to generate from", lambda newest=newest: checkpoint.load_model(newest))
        assert state_of(folder / CHECKPOINTS) == before, case
        if ends_well(case, lambda: run(folder, train=settings)):
            ran += 1
            rows = logged(folder)[0]
            assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6], case
            if not seal:  # it went on from step 2, or the change was none
                expected = expected or [row["train_loss"] for row in run(train=settings).rows]
                assert [row["train_loss"] for row in rows] == expected, case
        else:
            assert state_of(folder / CHECKPOINTS) == before, case
    assert 5 < ran < 45


def test_sharded_state(tmp_path):
    """The pieces that ranks saved: index and tensors. What is loaded at all is what was saved."""
    good, folder = tmp_path / "good", tmp_path / "state"
    whole = torch.arange(12.0)
    pieces = [Piece("a/b", (4, 3), start, whole[start : start + 4]) for start in (0, 4, 8)]
    shards.save_pieces(pieces, {"rest": {"a/step": 3}}, good)
    wanted = [("a/b", 2, 9), ("a/b", 12, 12)]
    loaded = 0
    for index in range(CASES["sharded state"]):
        generator = random.Random(index)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        file = generator.choice(sorted(folder.iterdir()))
        content = file.read_bytes()
        if file.suffix == ".json" and generator.random() < 0.8:
            file.write_text(json.dumps(changed(generator, json.loads(content))))
        elif file.suffix == ".safetensors" and generator.random() < 0.6:
            file.write_bytes(changed_safetensors(generator, content))
        else:
            file.write_bytes(scrambled(generator, content))
        before = state_of(folder)
        case = f"sharded state {index}: {file.name}: {file.read_bytes()[:200]!r}"

        def read(case=case) -> None:
            shards.load_shared(folder)
            part, empty = shards.load_pieces(wanted, folder)
            assert torch.equal(part, whole[2:9]) and empty.numel() == 0, case

        loaded += ends_well(case, read)
        assert state_of(folder) == before, case
    assert 0 < loaded < CASES["sharded state"] // 2


def test_there_are_enough_cases():
    assert sum(CASES.values()) >= 1000
    assert config(train={"dtype": "fp16"}).train.dtype == "fp16"
