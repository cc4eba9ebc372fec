"""Checkpoints: everything that training needs to go on exactly, in a folder that appears whole or not at all.

    step-00000500/
        model.safetensors       weights; the model's config in the file's metadata, so that this file alone is a model
        optimizer.safetensors   the optimizer's tensors
        state.json              step, the rest of the optimizer (with its learning rate), sampler, RNG, config, extra
        checksums.json          SHA-256 of the three

A folder is written under a temporary name beside its place, flushed to the disk, and renamed. Loading reads safetensors
and JSON, never pickle, and verifies the checksums first, then that it read a checkpoint. Weights and optimizer state
are whole, in the format of one process, however many trained, so that any number of processes can go on.

Saver writes while training goes on: the tensors are copied to host memory, on a GPU by a stream of its own into pinned
memory that is kept, and a thread writes the copy, without Python's lock, which safetensors' own save_file would hold.
At most one checkpoint is on its way. Limits: the copy takes as much host memory as the checkpoint; of sharded state,
the gathering is not in the background.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lmsys.config import ModelConfig, build, require, to_dict
from lmsys.cost import model_parameters
from lmsys.model import TransformerLM
from lmsys.records import atomic_path, flush, naming

MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
CHECKSUMS_FILE = "checksums.json"
CHECKPOINTS = "checkpoints"  # the folder of a run that holds them
_NAME = re.compile(r"step-(\d{8,})")
_PART_BYTES = 1 << 24  # hashed while in the cache, then written
_REPLACED = "-replaced"  # ends the name of a checkpoint that a new one of its step is about to replace


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, on the CPU. optimizer is a state_dict; rng is for set_rng_state."""

    path: Path
    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    sampler: dict[str, Any]
    rng: dict[str, Any]
    config: dict[str, Any]
    extra: dict[str, Any]
    valid_loss: float | None = None


@dataclass(frozen=True)
class Snapshot:
    """What is to be written, the tensors wherever they lie; state is state.json's text."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: str
    model_config: str


# --- Saving ---------------------------------------------------------------------------------------


def snapshot(
    step: int,
    *,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    config: Any,
    sampler_state: Mapping[str, Any] | None = None,
    rng: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    valid_loss: float | None = None,
) -> Snapshot:
    """What a checkpoint of this moment holds. Its tensors are those given: no copy is made.

    Args:
        weights: as model_weights() gives them. optimizer: an optimizer's state_dict.
        sampler_state, rng, extra: JSON-ready; rng: that of another moment than this, as rng_state() gave it.
        valid_loss: at this step, by which keep_best chooses.
    """
    config = to_dict(config)
    tensors, rest = _split_optimizer(optimizer)
    state = {"step": step, "valid_loss": valid_loss, "optimizer": rest, "sampler": dict(sampler_state or {})}
    state |= {"rng": dict(rng_state() if rng is None else rng), "config": config, "extra": dict(extra or {})}
    return Snapshot(step, dict(weights), tensors, json.dumps(state), json.dumps(config["model"]))


def write(folder: str | Path, content: Snapshot, *, keep_last: int | None = None, keep_best: int = 0) -> Path:
    """Write folder/step-<8 digits> and return its path. One of the same step is replaced.

    Args:
        keep_last: then remove all but the newest keep_last checkpoints up to this step, and
        keep_best: those of lowest validation loss.
    Raises:
        OSError: full disk, unwritable folder. Earlier checkpoints stay as they were and nothing half-written is left.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
    target = folder / f"step-{content.step:08d}"
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=f".{target.name}-"))
    weights = _safetensors(content.weights, {"model_config": content.model_config})
    contents = (weights, _safetensors(content.optimizer, {}), [content.state.encode()])
    try:
        sums = {}
        for name, parts in zip(FILES, contents, strict=True):
            with naming(target / name):
                sums[name] = _write(temporary / name, parts)
        with naming(target):
            _write(temporary / CHECKSUMS_FILE, [json.dumps(sums, indent=1).encode()])
            for file in (*temporary.iterdir(), temporary):  # mkdtemp makes its folder for the owner alone
                file.chmod(0o755 if file is temporary else 0o644)
                flush(file)
            if target.exists():
                os.rename(target, temporary.with_name(temporary.name + _REPLACED))
            os.rename(temporary, target)
            flush(folder)
    finally:
        recover(folder)
    if keep_last is not None:
        _prune(folder, content.step, keep_last, keep_best)
    return target


def recover(folder: str | Path) -> None:
    """Clear away what a save left that was killed or failed. For the one process that saves there."""
    for leftover in sorted(Path(folder).glob(".step-*")):
        target = leftover.with_name(leftover.name[1:].partition(_REPLACED)[0].rpartition("-")[0])
        if leftover.name.endswith(_REPLACED) and not target.exists():
            os.rename(leftover, target)  # it ended between the two renames
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _prune(folder: Path, step: int, keep_last: int, keep_best: int) -> None:
    """Remove the checkpoints up to a step that are neither among the newest nor among the best."""
    saved = [path for path in steps(folder) if step_of(path) <= step]
    best = _by_loss(saved)[:keep_best] if keep_best else []
    for path in saved[:-keep_last]:
        if path not in best:
            os.rename(path, path.with_name(f".{path.name}-removed"))  # so that none is half there under its name
    recover(folder)


class Saver:
    """Saves the checkpoints of a run, in the background or not.

    with Saver(folder, keep_last=2) as saver:
        saver.save(snapshot)      # returns when the tensors are copied, or on a GPU: when their copying is enqueued
        saver.before_update()     # before the tensors change

    Leaving the block waits for what is on its way and raises its error, or, when another error leaves it, warns of it.

    Args:
        background: False writes within save(). device: where the tensors lie. last: the newest checkpoint there is.
        keep: keep_last and keep_best, as for write().
    """

    def __init__(self, folder: str | Path, *, background: bool = True, device=None, last: Path | None = None, **keep):
        self.folder, self.background, self.last, self.keep = Path(folder), background, last, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None
        self._device: torch.device | None = device
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None  # recorded after the copying that before_update waits for
        self._pinned = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._pool.shutdown(wait=False)
        if kind is None:
            self.finish()
        elif self._writing is not None and (failure := self._writing.exception()) is not None:
            warnings.warn(f"the last checkpoint was not saved: {failure}", stacklevel=2)

    def save(self, content: Snapshot, *, owned: bool = False) -> None:
        """Save a snapshot, once the one before it is written.

        owned: no one else changes the snapshot's tensors on the CPU, which then need no copy.
        Raises:
            OSError: the one before it could not be written; without background, this one.
        """
        self.finish()
        if self.background:
            self._writing = self._pool.submit(self._write, self._copy(content, owned), self._copied)
        else:
            self.last = self._write(content, None)

    def before_update(self) -> None:
        """Let the GPU change the tensors after they have been copied. Nothing waits on the CPU."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
            self._copied = None

    @property
    def failed(self) -> bool:
        """Whether what was on its way has failed; waits for nothing."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def finish(self) -> Path | None:
        """Wait for what is on its way. Returns the last checkpoint, or raises the error of one that was not written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self.last = writing.result()
        return self.last

    def _write(self, content: Snapshot, copied: torch.cuda.Event | None) -> Path:
        if copied is not None:
            copied.synchronize()
        return write(self.folder, content, **self.keep)

    def _copy(self, content: Snapshot, owned: bool) -> Snapshot:
        """The snapshot with copies of its tensors; those of a GPU are whole when self._copied has happened."""
        groups = (content.weights, content.optimizer)
        on_gpu = [tensor for group in groups for tensor in group.values() if tensor.is_cuda]
        places = iter(self._pinned_like(on_gpu))
        if on_gpu:
            self._stream = self._stream or torch.cuda.Stream(self._device)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

        def copy(tensor: Tensor) -> Tensor:
            if not tensor.is_cuda:
                return tensor.detach() if owned else tensor.detach().clone()
            with torch.cuda.stream(self._stream):
                return next(places).copy_(tensor.detach(), non_blocking=True)

        weights, optimizer = ({name: copy(tensor) for name, tensor in tensors.items()} for tensors in groups)
        if on_gpu:
            self._copied = self._stream.record_event()
        return replace(content, weights=weights, optimizer=optimizer)

    def _pinned_like(self, tensors: list[Tensor]) -> list[Tensor]:
        """A place for each tensor in one pinned buffer, which is kept: to allocate pinned memory takes long."""
        ends = list(itertools.accumulate((-(-tensor.nbytes // 64) * 64 for tensor in tensors), initial=0))
        if ends[-1] > self._pinned.numel():
            self._pinned = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
        return [
            self._pinned[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(ends, tensors, strict=False)
        ]


def rng_state() -> dict[str, Any]:
    """The state of Python's and torch's random generators (CPU, and each GPU), JSON-ready."""

    def encoded(generator_state: Tensor) -> str:
        return base64.b64encode(generator_state.numpy().tobytes()).decode("ascii")

    state = {"python": list(random.getstate()), "torch": encoded(torch.get_rng_state())}
    if torch.cuda.is_initialized():  # else nothing has drawn from them, and a run on the CPU leaves the GPUs alone
        state["cuda"] = list(map(encoded, torch.cuda.get_rng_state_all()))
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators back; not a GPU's, where there are more or fewer GPUs. ValueError: not such a state."""

    def decoded(text: str) -> Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    try:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        torch.set_rng_state(decoded(state["torch"]))
        cuda = state.get("cuda", [])
        if cuda and torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(list(map(decoded, cuda)))
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"the state of the random generators is damaged ({first_line(error)})") from None


def model_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, each tensor once."""
    return {name: tensor.detach() for name, tensor in each_once(model.state_dict(keep_vars=True)).items()}


def each_once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor under its first name: a file of tensors cannot hold one under two."""
    seen: set[int] = set()
    return {name: tensor for name, tensor in state.items() if not (id(tensor) in seen or seen.add(id(tensor)))}


def _safetensors(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    """The parts of a safetensors file. Format: huggingface/safetensors, README, section Format."""
    # The widest first, as safetensors itself does: each then starts at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        dtype = str(tensor.dtype).removeprefix("torch.").upper()  # as safetensors names it: F32, BF16, I64, U8, BOOL
        dtype = dtype.replace("FLOAT", "F").replace("UINT", "U").replace("INT", "I")
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for _, tensor in ordered:
        yield memoryview(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write a file; return its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for part in parts:
            view = memoryview(part)
            for start in range(0, len(view), _PART_BYTES):
                piece = view[start : start + _PART_BYTES]
                digest.update(piece)
                while piece:  # the system may take a part of it
                    piece = piece[file.write(piece) :]
    return digest.hexdigest()


def _split_optimizer(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict as tensors, named INDEX.NAME, and what is JSON-ready."""
    tensors, rest = {}, {}
    for index, state in state_dict["state"].items():
        rest[str(index)] = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        tensors |= {f"{index}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {"state": rest, "param_groups": state_dict["param_groups"]}


def _join_optimizer(tensors: Mapping[str, Tensor], rest: Mapping[str, Any], path: Path) -> dict[str, Any]:
    with damage_told(path):
        state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in rest["state"].items()}
        for key, tensor in tensors.items():
            index, _, name = key.partition(".")
            state[int(index)][name] = tensor
        return {"state": state, "param_groups": [dict(group) for group in rest["param_groups"]]}


def first_line(error: BaseException) -> str:
    """What an error says, or its name; of what may quote a damaged file at any length, the beginning."""
    return (str(error).splitlines() or [type(error).__name__])[0][:500]


# --- Finding and loading --------------------------------------------------------------------------


def steps(folder: str | Path) -> list[Path]:
    """The checkpoints of a folder, oldest first, good or damaged."""
    return sorted((path for path in Path(folder).glob("step-*") if _NAME.fullmatch(path.name)), key=step_of)


def latest(folder: str | Path) -> Path | None:
    """The newest good checkpoint, or None. Warns of each newer one that is damaged."""
    for path in reversed(steps(folder)):
        if (damage := _damage(path)) is None:
            return path
        warnings.warn(f"skipping a damaged checkpoint: {damage}", stacklevel=2)
    return None


def best(folder: str | Path) -> Path | None:
    """The good checkpoint of lowest validation loss, or None where none was evaluated."""
    return next((path for path in _by_loss(steps(folder)) if _damage(path) is None), None)


def _by_loss(paths: Iterable[Path]) -> list[Path]:
    """Those of the checkpoints that were evaluated, the lowest validation loss first; none that is damaged."""
    losses = {}
    for path in paths:
        with suppress(ValueError, OSError):
            if (loss := _read_state(path)["valid_loss"]) is not None:
                losses[path] = loss
    return sorted(losses, key=losses.__getitem__)


def load(path: str | Path, *, verify: bool = True) -> Checkpoint:
    """Read a checkpoint. ValueError, naming the file and the newest good checkpoint: there is none, or it is damaged.

    verify: check its checksums; False where another process of the run has just done so.
    """
    path = _verified(path) if verify else Path(path)
    state, weights = _read_state(path), _load_tensors(path / MODEL_FILE)
    optimizer = _join_optimizer(_load_tensors(path / OPTIMIZER_FILE), state["optimizer"], path)
    rest = {name: state[name] for name in ("step", "sampler", "rng", "config", "extra", "valid_loss")}
    return Checkpoint(path=path, weights=weights, optimizer=optimizer, **rest)


def _read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint, of the right form; ValueError where it is not."""
    file = path / STATE_FILE
    state = _json_object(file.read_bytes(), f"{file} is damaged: it")
    state.setdefault("valid_loss", None)
    for name in ("optimizer", "sampler", "rng", "config", "extra"):
        require(isinstance(state.get(name), dict), f"{file} is damaged: '{name}' is not an object")
    model = state["config"].get("model")
    require(isinstance(model, dict), f"{file} is damaged: its config has no section 'model'")
    step, loss = state.get("step"), state["valid_loss"]
    named = step_of(path) if _NAME.fullmatch(path.name) else step
    require(type(step) is int and step >= 0 and step == named, f"{file} is damaged: its step is {step!r:.60}")
    require(loss is None or type(loss) in (int, float), f"{file} is damaged: its valid_loss is {loss!r:.60}")
    return state


def _json_object(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON ({first_line(error)})") from None
    require(isinstance(value, dict), f"{what} is not an object")
    return value


def _load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError where it is not one."""
    try:
        return load_file(file)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({first_line(error)})") from None


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's weights into a model. ValueError where their names or shapes are not the model's."""
    wanted = {name: _described(tensor) for name, tensor in model_weights(model).items()}
    given = {name: _described(tensor) for name, tensor in weights.items()}
    for name in sorted(wanted.keys() | given.keys()):
        theirs, ours = given.get(name, "absent"), wanted.get(name, "absent")
        difference = f"{name} is {theirs} in the file and {ours} in the model"
        require(theirs == ours, f"the weights do not fit the model: {difference}")
    model.load_state_dict(weights, strict=False)  # a tied tensor is in the file under one of its names


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}" + ("" if tensor.is_floating_point() else f" of {tensor.dtype}")


def load_model(path: str | Path, *, attention_kernel: str = "vectorized_torch") -> tuple[TransformerLM, ModelConfig]:
    """The model of a checkpoint folder or of a .safetensors file that export_weights wrote, on the CPU."""
    path = Path(path)
    file = _verified(path) / MODEL_FILE if path.is_dir() else path
    require(file.exists(), f"no model at {path}; give a checkpoint folder (step-…) or an exported .safetensors file")
    weights = _load_tensors(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
    message = f"{file} has no model_config in its metadata: it was not written by lmsys"
    require("model_config" in metadata, message)
    given = _json_object(metadata["model_config"], f"{file} is damaged: its model_config")
    config = build(ModelConfig, given, str(file))
    require(config.vocab_size is not None, f"{file} is damaged: its model_config has no vocab_size")
    require(
        config.num_layers <= len(weights) and model_parameters(config) <= 2 * sum(map(Tensor.numel, weights.values())),
        f"the weights do not fit the model: {file} holds {len(weights)} tensors, too few for {config.num_layers} "
        f"layers of d_model {config.d_model}",
    )  # before a model of any size is made
    model = TransformerLM(config, attention_kernel=attention_kernel)
    load_weights(model, weights)
    return model, config


def export_weights(checkpoint: str | Path, target: str | Path) -> Path:
    """Copy a checkpoint's weights, with the model's config in their metadata, to one file for load_model."""
    source, target = _verified(checkpoint) / MODEL_FILE, Path(target)
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
    return target


@contextmanager
def damage_told(path: Path | None) -> Iterator[None]:
    """ValueError, naming the checkpoint, in place of what its state's wrong form leads to."""
    try:
        yield
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError, AssertionError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(f"{path} is damaged: {what}; remove it to go on from one before it") from error


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder name gives."""
    return int(_NAME.fullmatch(path.name).group(1))


def _verified(path: str | Path) -> Path:
    """The path of a good checkpoint, or ValueError."""
    path = Path(path)
    others = [other for other in reversed(steps(path.parent)) if other.resolve() != path.resolve()]
    damage = _damage(path) if path.is_dir() else f"no checkpoint at {path}"
    if damage is None:
        return path
    good = next((other for other in others if _damage(other) is None), None)
    raise ValueError(f"{damage}; " + (f"the newest good one is {good}" if good else "no good one lies beside it"))


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, naming the file, or None."""
    file = path / CHECKSUMS_FILE
    try:
        sums = json.loads(file.read_text(encoding="utf-8"))
        for name in FILES:
            file = path / name
            with file.open("rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != sums[name]:
                    return f"{file} is damaged: its SHA-256 is not the one in {CHECKSUMS_FILE}"
    except FileNotFoundError:
        return f"{file} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{path / CHECKSUMS_FILE} is damaged: it does not hold the three checksums"
    return None
