"""AdamW, its learning-rate schedule, and gradient clipping.

Sources: AdamW, Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, with the bias-corrected moments of Adam (arXiv
1412.6980); the cosine schedule, arXiv 1608.03983, eq. 5, without restarts; clipping by global norm, Pascanu et al.,
arXiv 1211.5063. Each update is a few torch._foreach operations over all tensors at once, which launch one kernel for
many tensors on a GPU. lmsys.step.adamw is the same update in one pass over memory. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay: theta <- theta - lr (m_hat / (sqrt(v_hat) + eps) + weight_decay theta).

    State of a parameter: step (int), exp_avg and exp_avg_sq, of its shape and dtype: state_dict round-trips exactly.
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
    def step(
        self, closure: Callable[[], Tensor] | None = None, *, gradient_scale: Tensor | None = None
    ) -> Tensor | None:
        """Update every parameter that has a gradient. Returns the closure's loss, if one is given.

        gradient_scale: what gradients are multiplied by on the way, a scalar on their device, as clip_factor gives it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_step: dict[int, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self._state(parameter)
                    state["step"] += 1
                    by_step[state["step"]].append(parameter)
            for step, parameters in by_step.items():
                self._update(parameters, step, group, gradient_scale)
        return loss

    def _state(self, parameter: nn.Parameter) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state |= {"step": 0} | dict(zip(("exp_avg", "exp_avg_sq"), self._moments(parameter), strict=True))
        return state

    def _moments(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        """Both, zero, for the first step."""
        return torch.zeros_like(parameter), torch.zeros_like(parameter)

    def _update(
        self, parameters: list[nn.Parameter], step: int, group: dict[str, Any], gradient_scale: Tensor | None
    ) -> None:
        lr, eps, (beta1, beta2) = group["lr"], group["eps"], group["betas"]
        grads = [parameter.grad for parameter in parameters]
        if gradient_scale is not None:
            grads = torch._foreach_mul(grads, gradient_scale)
        first, second = ([self.state[one][name] for one in parameters] for name in ("exp_avg", "exp_avg_sq"))
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, math.sqrt(1 - beta2**step))
        torch._foreach_add_(denominator, eps)
        torch._foreach_addcdiv_(parameters, first, denominator, value=-lr / (1 - beta1**step))


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
    """A step's learning rate: linear from 0 to learning_rate at warmup_steps, cosine to min_ at total_steps.

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
        the norm before clipping, a scalar on the device, in fp32 at least; reading it is what waits for the device.
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
    """What gradients of a global norm are multiplied by to have at most max_norm: a scalar on the device, at most 1."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
