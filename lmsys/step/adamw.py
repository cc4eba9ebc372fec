"""FusedAdamW: lmsys.step.optimizer.AdamW in one pass over memory, gradients clipped on the way.

The least that AdamW can move is 28 bytes an fp32 parameter: gradient, parameter and two moments read, the last three
written. Moments lie in flat fp32 buffers, of which the optimizer's state holds views; gradients stay where autograd put
them, and a table of addresses, sent again only when one changed, tells the kernel where.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmsys.step.kernels import SUM, resolve_path, tl, triton
from lmsys.step.optimizer import AdamW, clip_grad_norm

_BLOCK, _WARPS = 2048, 8  # elements of a program: 8 a thread, two vector loads of each fp32 array
_SQUARES_BLOCKS = 4  # of a program: their addresses are looked up, and their elements under way, together


@triton.jit
def _gradient_block(gradients, lengths, firsts, slots, block, exists, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """A block's tensor, its first element there, that one's address in the gradient, and the elements from there on."""
    slot = tl.load(slots + block, mask=exists, other=0)
    address = tl.load(gradients + slot)
    inner = (block - tl.load(firsts + slot)).to(tl.int64) * BLOCK
    remaining = tl.where(exists & (address != 0), tl.load(lengths + slot) - inner, 0)
    gradient = address.to(tl.pointer_type(tl.float32)) + inner
    if ALIGNED:
        gradient = tl.multiple_of(gradient, 16)
        remaining = tl.multiple_of(remaining, 8)
    return slot, inner, gradient, remaining


@triton.jit
def _adamw_kernel(
    gradients, parameters, lengths, firsts, slots, exp_avgs, exp_avg_sqs, gradient_scale,
    decay, lerp1, beta2, lerp2, step_size, correction, eps,
    SCALED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A step of AdamW on one block of one tensor.

    gradients, parameters: (tensors,) addresses, a gradient's 0 where there is none; lengths: (tensors,) elements;
    firsts: (tensors,) the first program of each; slots: (programs,) the tensor of each. exp_avgs, exp_avg_sqs: flat
    fp32, BLOCK elements a program, under way while the tables are read.
    """
    program = tl.program_id(0)
    local = tl.arange(0, BLOCK)
    flat = program.to(tl.int64) * BLOCK + local
    m = tl.load(exp_avgs + flat)
    v = tl.load(exp_avg_sqs + flat)
    slot, inner, gradient, remaining = _gradient_block(gradients, lengths, firsts, slots, program, True, ALIGNED, BLOCK)
    parameter = tl.load(parameters + slot).to(tl.pointer_type(tl.float32)) + inner
    if ALIGNED:
        parameter = tl.multiple_of(parameter, 16)
    mask = local < remaining
    g = tl.load(gradient + local, mask=mask, other=0.0)
    theta = tl.load(parameter + local, mask=mask, other=0.0)
    if SCALED:
        g *= tl.load(gradient_scale)
    m += lerp1 * (g - m)
    v = beta2 * v + lerp2 * g * g
    theta = decay * theta - step_size * (m / (tl.sqrt(v) / correction + eps))
    tl.store(exp_avgs + flat, m, mask=mask)
    tl.store(exp_avg_sqs + flat, v, mask=mask)
    tl.store(parameter + local, theta, mask=mask)


@triton.jit
def _squares_kernel(
    gradients, lengths, firsts, slots, sums, count, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    """sums[program]: of the squares of BLOCKS of the `count` blocks of the tables that _adamw_kernel has."""
    local = tl.arange(0, BLOCK)
    total = tl.full([BLOCK], 0.0, tl.float32)
    for index in tl.static_range(BLOCKS):
        block = tl.program_id(0) * BLOCKS + index
        _, _, gradient, remaining = _gradient_block(
            gradients, lengths, firsts, slots, block, block < count, ALIGNED, BLOCK
        )
        g = tl.load(gradient + local, mask=local < remaining, other=0.0)
        total += g * g
    tl.store(sums + tl.program_id(0), tl.reduce(total, 0, SUM))


class FusedAdamW(AdamW):
    """AdamW as one Triton kernel a parameter group. Its state_dict() is AdamW's, and either loads the other's.

    settings, named: AdamW's. path: triton, torch, or auto, which is triton on a GPU.
    """

    def __init__(self, params: Iterable[Any], *settings: Any, path: str = "auto", **named: Any):
        self._path = path
        self._buffers: list[_Buffers] = []  # of each group
        self._places: dict[nn.Parameter, tuple[_Buffers, int]] = {}  # in the order of the groups
        super().__init__(params, *settings, **named)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        parameters = self.param_groups[-1]["params"]
        self._buffers.append(_Buffers(parameters, self._path))
        self._places |= {parameter: (self._buffers[-1], slot) for slot, parameter in enumerate(parameters)}

    def _moments(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        buffers, slot = self._places[parameter]
        return buffers.view(buffers.exp_avg, slot), buffers.view(buffers.exp_avg_sq, slot)

    def _update(
        self, parameters: list[nn.Parameter], step: int, group: dict[str, Any], gradient_scale: Tensor | None
    ) -> None:
        buffers, _ = self._places[parameters[0]]
        if buffers.fused:
            buffers.update([self._places[one][1] for one in parameters], step, group, gradient_scale)
        else:
            super()._update(parameters, step, group, gradient_scale)

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """The global 2-norm of the gradients, as clip_grad_norm measures it, by a kernel a group."""
        if not all(buffers.fused for buffers in self._buffers):
            return clip_grad_norm(self._places, 0)
        sums = [part for buffers in self._buffers if (part := buffers.squares()) is not None]
        return torch.cat(sums).sum().sqrt() if sums else torch.zeros(())

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the groups' settings, and copy the moments into the buffers in fp32."""
        super().load_state_dict({**state_dict, "state": {}})
        for buffers in self._buffers:
            buffers.exp_avg.zero_()
            buffers.exp_avg_sq.zero_()
        indices = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for parameter, index in zip(self._places, indices, strict=True):
            if saved := state_dict["state"].get(index):
                state = self._state(parameter)
                state["step"] = int(saved["step"])
                state["exp_avg"].copy_(saved["exp_avg"])
                state["exp_avg_sq"].copy_(saved["exp_avg_sq"])


class _Buffers:
    """Flat fp32 moments of a group's parameters, each of which begins at a multiple of _BLOCK elements."""

    def __init__(self, parameters: list[nn.Parameter], path: str):
        first = next(iter(parameters), torch.empty(0))
        for parameter in parameters:
            kind = parameter.dtype, parameter.device
            if kind != (torch.float32, first.device) or not parameter.is_contiguous():
                raise ValueError(
                    "FusedAdamW takes contiguous parameters in float32, a group on one device; one is "
                    f"{parameter.dtype}, with strides {parameter.stride()}, on {parameter.device}"
                )
        self.parameters, self.fused = parameters, not parameters or resolve_path(path, first) == "triton"
        blocks = [-(-parameter.numel() // _BLOCK) for parameter in parameters]
        *self.firsts, total = itertools.accumulate(blocks, initial=0)
        self.exp_avg = torch.zeros(total * _BLOCK, dtype=torch.float32, device=first.device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        lengths = torch.tensor([parameter.numel() for parameter in parameters], dtype=torch.int64)
        slots = torch.tensor([slot for slot, count in enumerate(blocks) for _ in range(count)], dtype=torch.int32)
        firsts = torch.tensor(self.firsts, dtype=torch.int32)
        self._places = tuple(table.to(first.device) for table in (lengths, firsts, slots))
        self._addresses: list[list[int]] = []
        self._has_whole_vectors = all(parameter.numel() % 8 == 0 for parameter in parameters)

    def view(self, flat: Tensor, slot: int) -> Tensor:
        """A parameter's part of a buffer, in its shape."""
        parameter, start = self.parameters[slot], self.firsts[slot] * _BLOCK
        return flat[start : start + parameter.numel()].view(parameter.shape)

    def update(self, slots: list[int], step: int, group: Mapping[str, Any], gradient_scale: Tensor | None) -> None:
        """A step of the parameters of these slots, in one kernel."""
        if self.exp_avg.numel() == 0:
            return
        _alive = self._point_at_gradients(slots)
        lr, (beta1, beta2) = group["lr"], group["betas"]
        with torch.cuda.device_of(self.exp_avg):
            _adamw_kernel[(self._places[-1].numel(),)](
                *self._tables, *self._places, self.exp_avg, self.exp_avg_sq,
                self.exp_avg if gradient_scale is None else gradient_scale,
                1 - lr * group["weight_decay"], 1 - beta1, beta2, 1 - beta2,
                lr / (1 - beta1**step), math.sqrt(1 - beta2**step), group["eps"],
                SCALED=gradient_scale is not None, ALIGNED=self._aligned, BLOCK=_BLOCK, num_warps=_WARPS,
            )  # fmt: skip

    def squares(self) -> Tensor | None:
        """Sums of the squares of the gradients, in fp32, each of some blocks, by one kernel; None without gradients."""
        slots = [slot for slot, parameter in enumerate(self.parameters) if parameter.grad is not None]
        if not slots or self.exp_avg.numel() == 0:
            return None
        _alive = self._point_at_gradients(slots)
        count = self._places[-1].numel()
        sums = self.exp_avg.new_empty(-(-count // _SQUARES_BLOCKS))
        with torch.cuda.device_of(sums):
            _squares_kernel[(sums.numel(),)](
                self._tables[0], *self._places, sums, count,
                ALIGNED=self._aligned, BLOCK=_BLOCK, BLOCKS=_SQUARES_BLOCKS, num_warps=_WARPS,
            )  # fmt: skip
        return sums

    def _point_at_gradients(self, slots: list[int]) -> dict[int, Tensor]:
        """Let the tables hold the addresses of these gradients and of all parameters.

        Returns what must live until the kernel is launched: copies of gradients that are not contiguous.
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
