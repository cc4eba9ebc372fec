"""What ends a run early or skips a step: a bad loss or gradient, a signal, a failed write of a checkpoint."""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lmsys.config import TrainConfig
from lmsys.data import BatchSampler
from lmsys.parallel import group

SPIKE_WINDOW, SPIKE_LEAST = 64, 8  # losses that a spike is measured against: at most, at least
SKIPS_IN_A_ROW = 10  # a run that skips more is beyond help


class Guard:
    """Tells bad steps: a loss or gradient norm that is not finite, a loss far above the median of those before it.

    It is given means over the ranks, so that each process tells the same.
    """

    def __init__(self, settings: TrainConfig, sampler: BatchSampler, state: dict[str, Any] | None):
        self.factor, self.sampler = settings.loss_spike, sampler
        self.norms_overflow = settings.dtype == "fp16"  # and the gradient scaler sees to it
        state = state or {"step": 0, "losses": [], "in_a_row": 0, "skipped": []}
        self.step = int(state["step"])  # the last one that was looked at
        self.losses = deque((float(loss) for loss in state["losses"]), maxlen=SPIKE_WINDOW)
        self.in_a_row = int(state["in_a_row"])
        self.skipped: list[dict[str, Any]] = list(state["skipped"])

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "losses": [*self.losses], "in_a_row": self.in_a_row, "skipped": [*self.skipped]}

    def fault(self, loss: float, norm: float) -> str | None:
        """What is bad about a step, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm) and not self.norms_overflow:
            return f"the gradient norm is {norm}"
        if self.factor is None or len(self.losses) < SPIKE_LEAST:
            return None
        usual = statistics.median(self.losses)
        if loss <= self.factor * usual:
            return None
        median = f"the median {usual:.4g} of the {len(self.losses)} before it"
        return f"the loss is {loss:.4g}, {loss / usual:.3g} times {median},"

    def accept(self, step: int, loss: float) -> None:
        self.step, self.in_a_row = step, 0
        self.losses.append(loss)

    def skip(self, step: int, fault: str, say: Callable[[str], None]) -> None:
        """A bad step that changes nothing. FloatingPointError where it is one of too many."""
        self.step, self.in_a_row = step, self.in_a_row + 1
        self.skipped.append({"step": step, "draw": self.sampler.draws - 1, "fault": fault})
        if self.in_a_row > SKIPS_IN_A_ROW:
            raise FloatingPointError(
                f"{fault} at step {step}, as in the {SKIPS_IN_A_ROW} steps before it, which were skipped; lower "
                f"optim.learning_rate or warm up longer ({self.batch()})"
            )
        say(f"step {step} is skipped: {fault} ({self.batch()})")

    def batch(self, ago: int = 0) -> str:
        """Which batch the step `ago` steps back read."""
        return f"its batch is draw {self.sampler.draws - 1 - ago} of the sampler with seed {self.sampler.seed}"


class Requests:
    """What asks a run to end after the step at hand: SIGTERM or SIGINT to a process, a failed write on rank 0.

    with Requests(device, stop) as requests:
        requests.savable = True             # once a step is done
        request = requests.agreed(failed)   # once a step, by all processes: the same NOTHING, STOP or FAILED in each

    Within the block, a signal is noted; until a step is done, it raises stop(number) at once. A second
    SIGINT raises KeyboardInterrupt, unless it follows within a moment: torchrun passes on what its processes may have
    got as well. Between processes the request travels as one number a step. On a GPU it is that of the step before,
    whose end the host then waits for: it stays one step ahead of the GPU, which is never idle for it.
    """

    NOTHING, STOP, FAILED = range(3)
    _TWICE_S = 2.0

    def __init__(self, device: torch.device, stop: Callable[[int], BaseException]):
        self.number: int | None = None  # of the signal that this process got
        self._device, self._stop = device, stop
        self._at = -math.inf
        self.savable = False  # whether a step is done
        self._handlers: dict[int, Any] = {}
        self._flying: tuple[Tensor, torch.cuda.Event] | None = None  # the last step's, on its way to the host
        self._slots: list[Tensor] = []

    def __enter__(self) -> Requests:
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        before, self._at = self._at, time.monotonic()
        if self.number is None:
            self.number = number
            if not self.savable:
                raise self._stop(number)
        elif number == signal.SIGINT and self._at - before > self._TWICE_S:
            raise KeyboardInterrupt

    def agreed(self, failed: bool) -> int:
        """The gravest request of any process, the same in all of them."""
        mine = self.FAILED if failed else self.NOTHING if self.number is None else self.STOP
        if group.current()[1] == 1:
            return mine
        request = torch.full((1,), mine, dtype=torch.int32, device=self._device)
        dist.all_reduce(request, op=dist.ReduceOp.MAX)
        if self._device.type != "cuda":
            return int(request)
        self._slots = self._slots or [torch.zeros(1, dtype=torch.int32, pin_memory=True) for _ in range(2)]
        arrived, slot = self._flying, self._slots[0]
        self._slots.reverse()
        slot.copy_(request, non_blocking=True)
        self._flying = slot, torch.cuda.current_stream(self._device).record_event()
        if arrived is None:
            return self.NOTHING
        arrived[1].synchronize()
        return int(arrived[0])
