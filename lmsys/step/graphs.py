"""A forward and backward pass as one CUDA graph: one launch by the host in place of one a kernel.

A model of many small layers at a small batch keeps the GPU waiting for the host: xl of the course's sizes at 4 x 512
tokens takes some 2,000 launches a step. A captured pass replays them, communication of gradients included.

What is captured is what the function does on the GPU, with the addresses that it had: inputs are copied to where the
captured ones lie, and the captured gradients put back into .grad. Python inside the function, hooks included, does not
run again. Everything must run on one stream that is not the default one (on_own_stream()), or autograd would wait for a
stream that is not captured.

Source: PyTorch's notes on CUDA graphs, whole-network capture.
Limits: no value that the host reads during the pass; inputs of one shape; memory of the pass stays reserved between its
calls. NCCL waits for a captured pass when the communicators that it used are closed: let go of the pass first. A
function bound to the object that keeps its pass is a circle, which only the collector would find.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARMUP = 11  # steps before capturing: compilation, the order of gradients; torch's DDP times ten, and the host waits

Replay = Callable[[], None]


def on_own_stream(device: torch.device) -> None:
    """Have this thread's later work go to a stream of its own, as capturing needs it. Before parameters get hooks."""
    if torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        return  # libraries hold a workspace for every stream that they have seen
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    torch.cuda.set_stream(stream)


class GraphedPass:
    """Call it as the function that it is given: the first call captures it, each one replays it.

    Args:
        function: of tensors on the GPU to one tensor, the loss; leaves gradients in .grad of the parameters, or adds to
            those that a pass captured before has left. It has run WARMUP times, on the same stream.
        pool: memory of passes that are replayed in the order in which they were captured; None: its own.
        capture: runs a function under capture and returns its result and the replay; None: CUDA's.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        parameters: Sequence[Tensor],
        *,
        pool: Any = None,
        capture: Callable[[Callable[[], Tensor], Any], tuple[Tensor, Replay]] | None = None,
    ):
        self._function, self._parameters, self._pool = function, list(parameters), pool
        self._capture = capture or _capture
        self._inputs: list[Tensor] = []
        self._gradients: list[Tensor | None] = []
        self._loss: Tensor | None = None
        self._replay: Replay | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The loss, which the next replay overwrites. RuntimeError: the pass cannot be captured."""
        if self._replay is None:
            self._inputs = [tensor.clone() for tensor in inputs]
            self._loss, self._replay = self._capture(lambda: self._function(*self._inputs), self._pool)
            self._gradients = [parameter.grad for parameter in self._parameters]
        for mine, given in zip(self._inputs, inputs, strict=True):
            if mine.shape != given.shape:
                raise ValueError(f"a captured pass takes inputs of shape {tuple(mine.shape)}, not {tuple(given.shape)}")
            mine.copy_(given, non_blocking=True)
        self._replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._loss


def _capture(function: Callable[[], Tensor], pool: Any) -> tuple[Tensor, Replay]:
    """Capture on the current stream. Other threads, such as NCCL's watchdog, may go on calling CUDA."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():
        raise RuntimeError("a pass is captured on the default stream; call on_own_stream() before the model is made")
    generator = torch.cuda.default_generators[stream.device_index]
    before = generator.clone_state()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            loss = function().detach()
    except RuntimeError as error:
        generator.graphsafe_set_state(before)  # the one that was captured would draw no number outside of a capture
        first: BaseException = error  # ending a capture that has failed fails as well, and says less
        while isinstance(first.__context__, RuntimeError):
            first = first.__context__
        reason = str(first).strip().splitlines()[0]
        raise RuntimeError(f"the forward and backward pass cannot be captured as a CUDA graph ({reason})") from error
    return loss, graph.replay
