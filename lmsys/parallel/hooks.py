"""A hook on a gradient that does not keep its owner alive.

A parameter holds its hooks in C++, where Python's garbage collector does not look. A hook that holds its wrapper, which
holds the parameter, would be a circle that never goes, and the model with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle


def on_gradient(parameter: Tensor, method: Callable[..., None], *args: Any) -> RemovableHandle:
    """Have backward call method(*args, parameter), while its object lives, when it has added to parameter.grad.

    args: plain values, or the circle is there again.
    """
    weak = weakref.WeakMethod(method)

    def hook(parameter: Tensor) -> None:
        alive = weak()
        if alive is not None:
            alive(*args, parameter)

    return parameter.register_post_accumulate_grad_hook(hook)
