"""AdamW, its learning-rate schedule, and gradient clipping.

Sources: AdamW, Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, with the bias-corrected moments of Adam (arXiv
1412.6980); the cosine schedule, arXiv 1608.03983, eq. 5, without restarts; clipping by global norm, Pascanu et al.,
arXiv 1211.5063. Each update is a few torch._foreach operations over all tensors at once, which launch one kernel for
many tensors on a GPU. FusedAdamW is the same update in one pass over memory, and keeps fp32 masters of parameters in bf16. Nothing
here waits for the device.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay: theta <- theta - lr (m_hat / (sqrt(v_hat) + eps) + weight_decay theta).

    State of a parameter: step (int), exp_avg and exp_avg_sq (of its shape and dtype), so that state_dict round-trips exactly.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ):
        if lr < 0:
            raise ValueError(f"lr is {lr}; it must be 0 or more")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}; each must be in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient. Returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_step: dict[int, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {
                        "step": 0,
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
                state["step"] += 1
                by_step[state["step"]].append(parameter)
            for step, parameters in by_step.items():
                self._update(parameters, step, group)
        return loss

    def _update(self, parameters: list[nn.Parameter], step: int, group: dict[str, Any]) -> None:
        grads = [parameter.grad for parameter in parameters]
        first = [self.state[parameter]["exp_avg"] for parameter in parameters]
        second = [self.state[parameter]["exp_avg_sq"] for parameter in parameters]
        _adamw_(parameters, grads, first, second, step, group)


def _adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    step: int,
    group: Mapping[str, Any],
) -> None:
    lr, eps, (beta1, beta2) = group["lr"], group["eps"], group["betas"]
    if group["weight_decay"]:
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
    torch._foreach_lerp_(first, grads, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)
    denominator = torch._foreach_sqrt(second)
    torch._foreach_div_(denominator, math.sqrt(1 - beta2**step))
    torch._foreach_add_(denominator, eps)
    torch._foreach_addcdiv_(weights, first, denominator, value=-lr / (1 - beta1**step))


# --- One pass over memory -------------------------------------------------------------------------


class FusedAdamW(AdamW):
    """AdamW as one Triton kernel a parameter group: 28 bytes of memory traffic an fp32 parameter, the least there is.

    Moments lie in flat fp32 buffers, of which state holds views. A parameter in bf16 or fp16 has an fp32 master in such a buffer: the
    kernel updates that and writes the parameter rounded from it. Gradients stay where autograd put them; a table of addresses, sent
    again only when one changed, tells the kernel where. On a CPU the same update is done with torch._foreach operations.

    state_dict() is that of AdamW, moments in fp32, and either loads the other's. Masters are not in it: they are the model's weights,
    and masters() gives them for a checkpoint in place of the rounded ones.

    Args:
        masters: fp32 values of narrower parameters, as to_low_precision returns them; without, the parameters' own.
        path: triton, torch, or auto, which is triton on a GPU.
    Raises:
        ValueError: parameters that are not contiguous, in fp32, bf16 or fp16, and, in a group, on one device.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        masters: Mapping[nn.Parameter, Tensor] | None = None,
        path: str = "auto",
    ):
        if path not in ("auto", "triton", "torch"):
            raise ValueError(f"path is '{path}'; it must be auto, triton or torch")
        self._path, self._given = path, masters or {}
        self._buffers: list[list[_Buffers]] = []  # of each group, by dtype
        super().__init__(params, lr, betas, eps, weight_decay)
        self._given = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, and buffers for the group."""
        super().add_param_group(param_group)
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = defaultdict(list)
        for parameter in self.param_groups[-1]["params"]:
            by_dtype[parameter.dtype].append(parameter)
        self._buffers.append([_Buffers(parameters, self._given) for parameters in by_dtype.values()])

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Tensor] | None = None, *, gradient_scale: Tensor | None = None
    ) -> Tensor | None:
        """Update every parameter that has a gradient. Returns the closure's loss, if one is given.

        gradient_scale: what gradients are multiplied by on the way, an fp32 scalar on their device, as clip_factor gives it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, found in zip(self.param_groups, self._buffers, strict=True):
            for buffers in found:
                by_step: dict[int, list[int]] = defaultdict(list)
                for slot, parameter in enumerate(buffers.parameters):
                    if parameter.grad is not None:
                        state = self._state(buffers, slot)
                        state["step"] += 1
                        by_step[state["step"]].append(slot)
                for step, slots in by_step.items():
                    if self._fused(buffers):
                        buffers.update_fused(slots, step, group, gradient_scale)
                    else:
                        buffers.update(slots, step, group, gradient_scale)
        return loss

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """The global 2-norm of the gradients, as clip_grad_norm measures it: a kernel a group and dtype, whatever the number of tensors."""
        found = list(itertools.chain.from_iterable(self._buffers))
        if not all(self._fused(buffers) for buffers in found):
            return clip_grad_norm((parameter for buffers in found for parameter in buffers.parameters), 0)
        sums = [part for buffers in found if (part := buffers.squares()) is not None]
        return torch.cat(sums).sum().sqrt() if sums else torch.zeros(())

    def _fused(self, buffers: _Buffers) -> bool:
        return self._path == "triton" or (self._path == "auto" and buffers.exp_avg.is_cuda)

    def _state(self, buffers: _Buffers, slot: int) -> dict[str, Any]:
        parameter = buffers.parameters[slot]
        state = self.state[parameter]
        if not state:
            views = (buffers.view(flat, slot) for flat in (buffers.exp_avg, buffers.exp_avg_sq))
            state |= {"step": 0} | dict(zip(("exp_avg", "exp_avg_sq"), views, strict=True))
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the groups' settings, and copy the moments into the buffers in fp32, whatever the parameters' dtype."""
        super().load_state_dict({**state_dict, "state": {}})
        indices = iter(itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        index_of = {
            id(parameter): next(indices) for parameter in (p for group in self.param_groups for p in group["params"])
        }
        for buffers in itertools.chain.from_iterable(self._buffers):
            buffers.exp_avg.zero_()
            buffers.exp_avg_sq.zero_()
            for slot, parameter in enumerate(buffers.parameters):
                saved = state_dict["state"].get(index_of[id(parameter)])
                if saved:
                    state = self._state(buffers, slot)
                    state["step"] = int(saved["step"])
                    state["exp_avg"].copy_(saved["exp_avg"])
                    state["exp_avg_sq"].copy_(saved["exp_avg_sq"])

    def masters(self) -> dict[nn.Parameter, Tensor]:
        """The fp32 values of the parameters that are narrower, of which these views are what the optimizer updates."""
        return {
            parameter: buffers.view(buffers.master, slot)
            for buffers in itertools.chain.from_iterable(self._buffers)
            if buffers.master is not None
            for slot, parameter in enumerate(buffers.parameters)
        }


class _Buffers:
    """Flat fp32 moments, and masters where they are needed, of parameters of one dtype. Each begins at a multiple of BLOCK elements."""

    BLOCK = 2048  # elements of a program of the kernel: 8 a thread, two vector loads of each fp32 array

    def __init__(self, parameters: list[nn.Parameter], masters: Mapping[nn.Parameter, Tensor]):
        first = parameters[0]
        for parameter in parameters:
            if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not parameter.is_contiguous():
                raise ValueError(
                    f"FusedAdamW takes contiguous parameters in float32, bfloat16 or float16; one is {tuple(parameter.shape)}, "
                    f"{parameter.dtype}, with strides {parameter.stride()}"
                )
            if parameter.device != first.device:
                raise ValueError(
                    f"FusedAdamW takes parameters of one device a group; got {first.device} and {parameter.device}"
                )
        self.parameters, self.dtype = parameters, first.dtype
        blocks = [-(-parameter.numel() // self.BLOCK) for parameter in parameters]
        *self.firsts, total = itertools.accumulate(blocks, initial=0)
        self.exp_avg = torch.zeros(total * self.BLOCK, dtype=torch.float32, device=first.device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.master = None if self.dtype == torch.float32 else torch.zeros_like(self.exp_avg)
        if self.master is not None:
            for slot, parameter in enumerate(parameters):
                self.view(self.master, slot).copy_(masters.get(parameter, parameter).detach())
        self._places = tuple(
            torch.tensor(values, dtype=dtype).to(first.device)
            for values, dtype in (
                ([parameter.numel() for parameter in parameters], torch.int64),
                (self.firsts, torch.int32),
                ([slot for slot, count in enumerate(blocks) for _ in range(count)], torch.int32),
            )
        )
        self._addresses: list[list[int]] = []
        self._aligned = False
        self._has_whole_vectors = all(parameter.numel() % 8 == 0 for parameter in parameters)
        self._tables: Tensor | None = None

    def view(self, flat: Tensor, slot: int) -> Tensor:
        """A parameter's part of a buffer, in its shape."""
        parameter, start = self.parameters[slot], self.firsts[slot] * self.BLOCK
        return flat[start : start + parameter.numel()].view(parameter.shape)

    def update(self, slots: list[int], step: int, group: Mapping[str, Any], gradient_scale: Tensor | None) -> None:
        """A step of the parameters of these slots, with torch's operations."""
        parameters = [self.parameters[slot] for slot in slots]
        grads = [parameter.grad.float() for parameter in parameters]
        if gradient_scale is not None:
            grads = torch._foreach_mul(grads, gradient_scale)
        first, second = ([self.view(flat, slot) for slot in slots] for flat in (self.exp_avg, self.exp_avg_sq))
        if self.master is None:
            _adamw_(parameters, grads, first, second, step, group)
        else:
            weights = [self.view(self.master, slot) for slot in slots]
            _adamw_(weights, grads, first, second, step, group)
            torch._foreach_copy_(parameters, weights)

    def update_fused(
        self, slots: list[int], step: int, group: Mapping[str, Any], gradient_scale: Tensor | None
    ) -> None:
        """A step of the parameters of these slots, in one kernel."""
        from lmsys.step.kernels import adamw_

        if self.exp_avg.numel() == 0:
            return
        _alive = self._point_at_gradients(slots)
        lr, (beta1, beta2) = group["lr"], group["betas"]
        scalars = (
            *(1 - lr * group["weight_decay"], 1 - beta1, beta2, 1 - beta2),
            *(lr / (1 - beta1**step), math.sqrt(1 - beta2**step), group["eps"]),
        )
        adamw_(
            (*self._tables, *self._places),
            self.master,
            self.exp_avg,
            self.exp_avg_sq,
            gradient_scale,
            scalars,
            dtype=self.dtype,
            aligned=self._aligned,
            block=self.BLOCK,
        )

    def squares(self) -> Tensor | None:
        """Sums of the squares of the gradients, in fp32, each of some blocks, by one kernel; None without gradients."""
        from lmsys.step.kernels import squares

        slots = [slot for slot, parameter in enumerate(self.parameters) if parameter.grad is not None]
        if not slots or self.exp_avg.numel() == 0:
            return None
        _alive = self._point_at_gradients(slots)
        return squares(self._tables[0], self._places, dtype=self.dtype, aligned=self._aligned, block=self.BLOCK)

    def _point_at_gradients(self, slots: list[int]) -> dict[int, Tensor]:
        """Let the tables hold the addresses of these gradients and of all parameters.

        Returns what is to live until the kernel is launched: a copy of a gradient that is not contiguous. After that its memory is
        reused in stream order.
        """
        grads = {slot: self.parameters[slot].grad.contiguous() for slot in slots}
        addresses = [
            [grads[slot].data_ptr() if slot in grads else 0 for slot in range(len(self.parameters))],
            [parameter.data_ptr() for parameter in self.parameters],
        ]
        if addresses != self._addresses:
            tables = torch.tensor(addresses, dtype=torch.int64)
            if self.exp_avg.is_cuda:
                tables = tables.pin_memory().to(self.exp_avg.device, non_blocking=True)
            self._addresses, self._tables = addresses, tables
            self._aligned = self._has_whole_vectors and all(address % 16 == 0 for part in addresses for address in part)
        return grads


@torch.no_grad()
def to_low_precision(module: nn.Module, dtype: torch.dtype) -> dict[nn.Parameter, Tensor]:
    """Make a module's matrices (2 or more dimensions) parameters of a narrower dtype; returns their values, for FusedAdamW's masters.

    Gains and other vectors, which cost nothing, stay as they are. Do this before a data-parallel wrapper sees the module.
    """
    masters = {}
    for parameter in module.parameters():
        if parameter.ndim >= 2:
            masters[parameter] = parameter.detach().clone()
            parameter.data = parameter.data.to(dtype)
    return masters


# --- Groups, schedule, clipping -------------------------------------------------------------------


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: matrices (2 or more dimensions) decay, gains and other vectors do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


def cosine_schedule(
    step: int, *, learning_rate: float, min_learning_rate: float, warmup_steps: int, total_steps: int
) -> float:
    """The learning rate of a step: linear from 0 to learning_rate at warmup_steps, cosine to min_learning_rate at total_steps.

    Training counts its steps from 1, so that the first one moves and the last one is at min_learning_rate.
    """
    if step < warmup_steps:
        return learning_rate * step / warmup_steps
    if step >= total_steps:
        return min_learning_rate
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_learning_rate + (learning_rate - min_learning_rate) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most max_norm. max_norm 0 or less: measure only.

    Returns:
        the norm before clipping, a scalar on the gradients' device, in fp32 at least; reading it is what waits for the device.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.zeros(())
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, dtype=dtype)))
    if max_norm > 0:
        torch._foreach_mul_(grads, clip_factor(norm, max_norm))
    return norm


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of a global norm are multiplied by so that it is at most max_norm: a scalar on the device, never above 1."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
