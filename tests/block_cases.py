"""What the tests of a block's parts share.

A small block, and what a forward and a backward pass of it give, eager or as one graph.
"""

import torch

from lmsys.config import ModelConfig
from lmsys.model import TransformerBlock

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def small_block() -> TransformerBlock:
    return TransformerBlock(ModelConfig(16, 24, 1, 2, 6, 10), "vectorized_torch").to(DEVICE)


def small_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """What a small block reads: (2, 6, 16), and angles, (6, 4)."""
    return torch.randn(2, 6, 16, device=DEVICE), torch.rand(6, 4, device=DEVICE)


def outcome(block, x, angles, *, compiled: bool, autocast: bool) -> list[torch.Tensor]:
    """The output, and the gradients of x and of the parameters, for the sum of the output's squares."""
    function = torch.compile(block, backend="aot_eager", fullgraph=True) if compiled else block
    block.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        y = function(leaf, angles.cos(), angles.sin())
    y.square().sum().backward()
    return [y, leaf.grad, *(parameter.grad for parameter in block.parameters())]
