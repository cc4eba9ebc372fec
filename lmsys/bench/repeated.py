"""The trainer's engine and its two kinds of step on one batch again and again, for what looks into a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lmsys.bench.measure import Repeated, release
from lmsys.config import ModelConfig, PipelineConfig, build
from lmsys.device import resolve_device
from lmsys.train.engine import Engine, autocast


class RepeatedStep:
    """The engine of a model. train: settings of the config's train section, device among them."""

    def __init__(self, model: ModelConfig, **train: Any):
        self.device = resolve_device(train["device"])
        self.engine = Engine(build(PipelineConfig, {"model": dataclasses.asdict(model), "train": train}), self.device)

    def batch(self, sequences: int, context_length: int) -> tuple[Tensor, Tensor]:
        """Random inputs and targets on the device, (sequences, context_length) each."""
        config = self.engine.config
        generator = torch.Generator().manual_seed(config.train.seed)
        shape = (2, sequences, context_length)
        return tuple(torch.randint(config.model.vocab_size, shape, generator=generator).to(self.device))

    def run(
        self,
        training: bool,
        batch: tuple[Tensor, Tensor],
        phase: Callable[[str], AbstractContextManager],
        learning_rate: float = 0.0,
    ) -> Tensor | None:
        """A step of the trainer, of which it returns the loss, or a forward pass without autograd.

        phase: the context of each part, see Engine.
        """
        engine = self.engine
        engine.phase = phase
        try:
            if training:
                loss = engine.accumulate(Repeated(batch))
                engine.update(learning_rate)
                return loss
            with phase("forward"), torch.no_grad(), autocast(self.device, engine.config.train.dtype):
                engine.model(batch[0])
        except Exception:
            engine.discard()  # gradients of a step that did not end
            raise
        return None


_at_hand: list[tuple[Any, Any]] = []


def at_hand(key: Any, make: Callable[[], Any], device: torch.device) -> Any:
    """make() of this key, kept until another key is asked for: one model is in memory at a time."""
    if not _at_hand or _at_hand[0][0] != key:
        _at_hand.clear()
        release(device)
        _at_hand.append((key, make()))
    return _at_hand[0][1]
