"""How each family of wrappers takes its part in a step: when it communicates, how it clips, steps, saves and loads.

A strategy wraps the model and makes the optimizer. All processes call each method at the same point of a run.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lmsys import parallel
from lmsys.config import PipelineConfig, TrainConfig
from lmsys.model import TransformerLM
from lmsys.parallel import group
from lmsys.step.optimizer import AdamW, clip_factor, clip_grad_norm, parameter_groups
from lmsys.train import checkpoint


class Replicated:
    """Every process holds all parameters, gradients and optimizer state; the wrapper averages gradients.

    Attributes:
        several: whether several processes train together; else this one is alone, even within a group.
        copies_state: whether the tensors on the CPU that whole_state() gives are copies, which no step changes.
        gathers: whether no_sync() still communicates, as parameters are gathered or sent whatever becomes of gradients.
    """

    gathers = False
    copies_state = False

    def __init__(self, config: PipelineConfig, model: TransformerLM, wrapper_options: dict[str, Any]):
        settings, optim = config.train, config.optim
        self.model, self.config, self.fused = model, config, settings.fused_optimizer
        self.several = parallel.get_wrapper(settings.ddp_wrapper).many_processes
        self.module = parallel.wrap(model, settings.ddp_wrapper, **_wrapper_options(settings) | wrapper_options)
        self.parameters = list(self.module.parameters())
        options = {"lr": optim.learning_rate, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
        self.optimizer = self._make_optimizer(parameter_groups(self.module, optim.weight_decay), options)
        self._gradient_scale: Tensor | None = None  # of clipping, where the fused optimizer applies it

    def _make_optimizer(self, groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
        if self.fused:
            from lmsys.step.adamw import FusedAdamW

            return FusedAdamW(groups, **options)
        return AdamW(groups, **options)

    # --- A step ---

    def no_sync(self) -> AbstractContextManager:
        """A backward pass in here adds up gradients and sends none."""
        return self.module.no_sync() if self.several else nullcontext()

    def sync(self) -> AbstractContextManager:
        """A backward pass in here is followed by finish()."""
        return nullcontext()

    def finish(self) -> None:
        """After a backward pass: every process has the gradients' mean."""
        if self.several:
            self.module.finish_gradient_synchronization()

    def clip(self, max_norm: float) -> Tensor:
        """Clip the gradients to a global norm, if that is positive. Returns their norm before that, on the device."""
        if not self.fused:
            return self._clip(max_norm)
        norm = self._clip(0)
        self._gradient_scale = clip_factor(norm, max_norm) if max_norm > 0 else None
        return norm

    def _clip(self, max_norm: float) -> Tensor:
        return self.optimizer.gradient_norm() if self.fused else clip_grad_norm(self.parameters, max_norm)

    def step(self, scaler: torch.amp.GradScaler, learning_rate: float) -> None:
        """The optimizer's step with the clipped gradients."""
        for options in self.optimizer.param_groups:
            options["lr"] = learning_rate
        scaler.step(self.optimizer, **({"gradient_scale": self._gradient_scale} if self.fused else {}))

    # --- The whole state, in the format of one process ---

    def whole_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and optimizer state; whole on rank 0."""
        return checkpoint.model_weights(self.model), self.optimizer.state_dict()

    def load_optimizer(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)

    # --- The model ---

    @property
    def forward(self) -> nn.Module:
        """What computes logits in evaluation, in all processes alike."""
        return self.model

    def whole_model(self) -> TransformerLM | None:
        """The model, to be called on rank 0 alone; None elsewhere."""
        return self.model if group.current()[0] == 0 else None


class ShardedState(Replicated):
    """ZeRO-1: replicas, each of which updates its share of the parameters and keeps the optimizer state of that share.

    With reduce_scatter_gradients the optimizer takes over the wrapper's part: each process receives the mean of its
    share alone.
    """

    gathers = True

    def _make_optimizer(self, groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
        from lmsys.parallel.zero1 import ShardedOptimizer

        self.scatters = self.config.train.reduce_scatter_gradients
        self.copies_state = self.parameters[0].is_cuda
        return ShardedOptimizer(groups, AdamW, reduce_scatter_gradients=self.scatters, **options)

    def no_sync(self) -> AbstractContextManager:
        stack = ExitStack()
        stack.enter_context(self.module.no_sync())
        if self.scatters:
            stack.enter_context(self.optimizer.no_sync())
        return stack

    def sync(self) -> AbstractContextManager:
        return self.module.no_sync() if self.scatters else nullcontext()

    def finish(self) -> None:
        (self.optimizer if self.scatters else self.module).finish_gradient_synchronization()

    def _clip(self, max_norm: float) -> Tensor:
        return self.optimizer.clip_grad_norm_(max_norm)

    def whole_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return checkpoint.model_weights(self.model), self.optimizer.full_state_dict()

    def load_optimizer(self, state: dict[str, Any]) -> None:
        self.optimizer.load_full_state_dict(state)


class FullySharded(Replicated):
    """Each process holds its part of the parameters, gradients and optimizer state; the wrapper gathers blocks."""

    gathers = True
    copies_state = True

    def _clip(self, max_norm: float) -> Tensor:
        return self.module.clip_grad_norm_(max_norm)

    def whole_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        weights = checkpoint.each_once(self.module.full_state_dict())
        return weights, self.module.gather_optimizer_state(self.optimizer)

    def load_optimizer(self, state: dict[str, Any]) -> None:
        self.module.scatter_optimizer_state(self.optimizer, state)

    @property
    def forward(self) -> nn.Module:
        return self.module

    def whole_model(self) -> TransformerLM | None:
        """A copy on rank 0, for which its GPU must have room."""
        weights = self.module.full_state_dict()
        if group.current()[0] != 0:
            return None
        with self.parameters[0].device:
            copy = TransformerLM(self.config.model, attention_kernel=self.config.train.attention_kernel)
        checkpoint.load_weights(copy, checkpoint.each_once(weights))
        return copy


def strategy(settings: TrainConfig) -> type[Replicated]:
    if parallel.get_wrapper(settings.ddp_wrapper).sharded:
        return FullySharded
    return ShardedState if settings.sharded_optimizer else Replicated


def _wrapper_options(settings: TrainConfig) -> dict[str, Any]:
    """The wrapper's own arguments, of those that the config sets. Dtypes are named there."""
    wrapper = parallel.get_wrapper(settings.ddp_wrapper)
    options = dict(wrapper.captured_options) if settings.cuda_graph else {}
    options |= {name: value for name in wrapper.options if (value := getattr(settings, name)) is not None}
    if "communication_dtype" in options:
        options["communication_dtype"] = {"bf16": torch.bfloat16, "fp32": None}[options["communication_dtype"]]
    if wrapper.sharded and settings.dtype == "bf16":
        options["compute_dtype"] = torch.bfloat16
    return options
