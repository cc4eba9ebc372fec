"""Checkpoints: everything that training needs to go on exactly, in a folder that appears whole or not at all.

    step-00000500/
        model.safetensors       weights; the model's config in the file's metadata, so that this file alone is a model
        optimizer.safetensors   the optimizer's tensors
        state.json              step, the rest of the optimizer (with its schedule's learning rate), sampler, RNG, config, extra
        checksums.json          SHA-256 of the three

A folder is written under a temporary name beside its place, flushed to the disk, and renamed. Loading reads safetensors
and JSON, never pickle, and verifies the checksums first. Weights and optimizer state are whole, in the format of one process,
however many processes trained: what is sharded is gathered before it is saved, so that any number of processes can go on.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lmsys.config import ModelConfig, build, to_dict
from lmsys.model import TransformerLM
from lmsys.records import atomic_path

MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, CHECKSUMS_FILE = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "checksums.json",
)
_NAME = re.compile(r"step-(\d{8,})")


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


# --- Saving ---------------------------------------------------------------------------------------


def save(
    folder: str | Path,
    step: int,
    *,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    sampler_state: Mapping[str, Any],
    rng: Mapping[str, Any],
    config: Any,
    extra: Mapping[str, Any] | None = None,
    keep_last: int | None = None,
) -> Path:
    """Write folder/step-<8 digits> and return its path. One of the same step is replaced.

    Args:
        weights: as model_weights() gives them. optimizer: an optimizer's state_dict.
        sampler_state, rng, extra: JSON-ready; rng as rng_state() gives it.
        config: a dataclass with a `model` section.
        keep_last: then remove all but the newest keep_last checkpoints up to this step.
    Raises:
        OSError: full disk, unwritable folder. Earlier checkpoints stay as they were and nothing half-written is left.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*"):  # of a process that was killed while saving
        shutil.rmtree(leftover, ignore_errors=True)
    target = folder / f"step-{step:08d}"
    config = to_dict(config)
    optimizer_tensors, optimizer_rest = _split_optimizer(optimizer)
    state = {
        "step": step,
        "optimizer": optimizer_rest,
        "sampler": dict(sampler_state),
        "rng": dict(rng),
        "config": config,
        "extra": dict(extra or {}),
    }
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=f".{target.name}-"))
    try:
        _save_tensors(weights, temporary / MODEL_FILE, {"model_config": json.dumps(config["model"])})
        _save_tensors(optimizer_tensors, temporary / OPTIMIZER_FILE, {})
        (temporary / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
        sums = {name: _sha256(temporary / name) for name in (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)}
        (temporary / CHECKSUMS_FILE).write_text(json.dumps(sums, indent=1), encoding="utf-8")
        for file in (*temporary.iterdir(), temporary):  # safetensors and mkdtemp make theirs for the owner alone
            file.chmod(0o755 if file is temporary else 0o644)
            _flush(file)
        if target.exists():
            replaced = temporary.with_name(f"{temporary.name}-replaced")
            os.rename(target, replaced)
            os.rename(temporary, target)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(temporary, target)
        _flush(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if keep_last is not None:
        for path in [path for path in steps(folder) if step_of(path) <= step][:-keep_last]:
            shutil.rmtree(path)
    return target


def rng_state() -> dict[str, Any]:
    """The state of Python's and torch's random generators (CPU, and each GPU), JSON-ready."""
    version, internal, gauss = random.getstate()
    state = {"python": [version, list(internal), gauss], "torch": _encode(torch.get_rng_state())}
    if torch.cuda.is_available():
        state["cuda"] = [_encode(one) for one in torch.cuda.get_rng_state_all()]
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators back. GPU states are skipped where the number of GPUs is another one."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(_decode(state["torch"]))
    cuda = state.get("cuda", [])
    if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_decode(one) for one in cuda])


def model_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, each tensor once."""
    return {name: tensor.detach() for name, tensor in each_once(model.state_dict(keep_vars=True)).items()}


def each_once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor under its first name: a file of tensors cannot hold one under two."""
    seen: set[int] = set()
    return {name: tensor for name, tensor in state.items() if not (id(tensor) in seen or seen.add(id(tensor)))}


def _save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:  # it wraps the system's error, of a full disk for one
        raise OSError(f"cannot write {path.name} of a checkpoint in {path.parent.parent}: {error}") from error


def _split_optimizer(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict as tensors, named INDEX.NAME, and what is JSON-ready."""
    tensors, rest = {}, {}
    for index, state in state_dict["state"].items():
        rest[str(index)] = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        tensors |= {f"{index}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {"state": rest, "param_groups": state_dict["param_groups"]}


def _join_optimizer(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in rest["state"].items()}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state[int(index)][name] = tensor
    return {"state": state, "param_groups": rest["param_groups"]}


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- Finding and loading --------------------------------------------------------------------------


def steps(folder: str | Path) -> list[Path]:
    """The checkpoints of a folder, oldest first, good or damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def latest(folder: str | Path) -> Path | None:
    """The newest good checkpoint, or None. Warns of each newer one that is damaged."""
    for path in reversed(steps(folder)):
        damage = _damage(path)
        if damage is None:
            return path
        warnings.warn(f"skipping a damaged checkpoint: {damage}", stacklevel=2)
    return None


def load(path: str | Path, *, verify: bool = True) -> Checkpoint:
    """Read a checkpoint.

    Args:
        verify: check its checksums; False where another process of the run has just done so.
    Raises:
        ValueError: there is none, or it is damaged: names the file and the newest good checkpoint beside it.
    """
    path = _verified(path) if verify else Path(path)
    state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    return Checkpoint(
        path=path,
        step=state["step"],
        weights=load_file(path / MODEL_FILE),
        optimizer=_join_optimizer(load_file(path / OPTIMIZER_FILE), state["optimizer"]),
        sampler=state["sampler"],
        rng=state["rng"],
        config=state["config"],
        extra=state["extra"],
    )


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's weights into a model. ValueError where their names or shapes are not the model's."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model_weights(model).items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise ValueError(
                f"the weights do not fit the model: {name} is {given.get(name, 'absent')} in the file "
                f"and {wanted.get(name, 'absent')} in the model"
            )
    model.load_state_dict(weights, strict=False)  # a tied tensor is in the file under one of its names


def load_model(path: str | Path, *, attention_kernel: str = "vectorized_torch") -> tuple[TransformerLM, ModelConfig]:
    """The model of a checkpoint folder or of a .safetensors file that export_weights wrote, on the CPU.

    Raises:
        ValueError: nothing there, damaged, or not a model of this package.
    """
    path = Path(path)
    file = _verified(path) / MODEL_FILE if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"no model at {path}; give a checkpoint folder (step-…) or an exported .safetensors file")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        weights = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}); export it again") from None
    if "model_config" not in metadata:
        raise ValueError(f"{file} has no model_config in its metadata: it was not written by lmsys")
    config = build(ModelConfig, json.loads(metadata["model_config"]), str(file))
    model = TransformerLM(config, attention_kernel=attention_kernel)
    load_weights(model, weights)
    return model, config


def export_weights(checkpoint: str | Path, target: str | Path) -> Path:
    """Copy a checkpoint's weights, with the model's config in their metadata, to one .safetensors file for load_model."""
    source, target = _verified(checkpoint) / MODEL_FILE, Path(target)
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
    return target


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
        for name in (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE):
            file = path / name
            if _sha256(file) != sums[name]:
                return f"{file} is damaged: its SHA-256 is not the one in {CHECKSUMS_FILE}"
    except FileNotFoundError:
        return f"{file} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{path / CHECKSUMS_FILE} is damaged: it does not hold the three checksums"
    return None
