"""Data parallel training: replicas of a module that average their gradients, four ways, each one idea beyond the last.

Naive, Flat, Overlap and FlashDDP are ours; TorchDDP is the peer. Source: Li et al., "PyTorch Distributed", arXiv
2006.15704 (buckets, overlap, unused parameters). Different here:
- Buckets are filled in the order in which gradients arrived in the first backward pass of rank 0, not of registration.
- The memory of gradients is autograd's own. A bucket of layout "grouped" is one NCCL launch over tensors that stay
  where they are; no buffer outlives the step. Layout "flat" copies a full bucket once, into a buffer that is then its
  gradients.
- Among GPUs of one machine their copy engines can carry the bytes (lmsys.parallel.copy_engine).
- Whether any rank used a parameter travels with the last bucket; only a rank that left one unused waits to read it.

In .grad a rank that did not use a parameter counts as zero; where no rank used it, .grad is None, as with one process.
All but the last backward pass of a step run under no_sync(). Ranks weigh alike, so their batches must have one shape: a
rank whose batch differs in shape from the first one's raises ValueError before its forward pass; where all ranks change
shape together, say check_batches=False.

Compile by block (block.compile()): a hook then runs as each block's backward ends. A module compiled whole delivers all
gradients at the end of backward, right but with nothing to overlap.

Limits: one device a process; dense gradients; buffers are not synchronized after the start; requires_grad is read once.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lmsys.config import TRANSPORTS
from lmsys.parallel import copy_engine, shards
from lmsys.parallel.copy_engine import CopyEngine
from lmsys.parallel.group import broadcast_from_rank0, check_initialized, check_same_everywhere, gather_objects

LAYOUTS = ("grouped", "flat")
BUCKET_MB = {"nccl": 25.0, "copy_engine": 100.0}  # of flashddp by default; a copy engine's message costs the host more
_ALIGNMENT = 32  # bytes, of a gradient in a buffer: vector loads of 16 bytes, and the sectors of a GPU's memory


class AllReduce:
    """Averages over a group by all-reduces of NCCL, or of Gloo on a CPU: the transport beside CopyEngine."""

    memory_bytes = 0  # that torch's allocator does not count

    def __init__(self, group: dist.ProcessGroup):
        self._group, self._is_nccl = group, dist.get_backend(group) == "nccl"
        self._one, self._several = dist.AllreduceOptions(), dist.distributed_c10d.AllreduceCoalescedOptions()
        # NCCL averages as it sums; Gloo only sums, and the gradients are divided before.
        self._one.reduceOp = self._several.reduceOp = dist.ReduceOp.AVG if self._is_nccl else dist.ReduceOp.SUM

    def average(self, tensors: list[Tensor], *, async_op: bool = True) -> dist.Work | None:
        """Average tensors of one dtype, in place and in one launch; async_op: start to, and return what to wait for."""
        if not self._is_nccl:
            torch._foreach_div_(tensors, dist.get_world_size(self._group))
        # The group's own methods: dist.all_reduce costs the host as much again as all that it calls.
        if len(tensors) == 1:
            self._one.asyncOp = async_op
            work = self._group.allreduce(tensors, self._one)
        else:
            self._several.asyncOp = async_op
            work = self._group.allreduce_coalesced(tensors, self._several)
        if work is not None and not async_op:
            work.wait()
        return work

    def close(self) -> None:
        """Nothing: unlike copy engines this has no rounds to end."""


class DataParallel(nn.Module):
    """A replica of a module and what the wrappers share. A wrapper defines _average().

    Args:
        module: on the device of its process; every process has the same one but for values.
        check_batches: refuse a batch whose shape differs from the first one's.
    """

    def __init__(self, module: nn.Module, *, check_batches: bool = True):
        super().__init__()
        check_initialized(type(self).__name__)
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._device = self._check(module)
        make_replicas(module)
        self.module = module
        self._synchronizes = True
        self._check_batches = check_batches
        self._batch_shape: torch.Size | None = None  # of the first forward pass
        self._batch_agreed = not check_batches
        self._transport: AllReduce | CopyEngine = AllReduce(dist.group.WORLD)
        self._arrived = bytearray(len(self.trained))  # gradients of this step, by index
        for index, parameter in enumerate(self.trained):
            shards.on_gradient(parameter, self._on_gradient, index)

    def _check(self, module: nn.Module) -> torch.device:
        """The module's one device."""
        name = type(self).__name__
        if not self.trained:
            raise ValueError(f"{name}: the module has no parameter that requires a gradient")
        devices = {parameter.device for parameter in module.parameters()}
        is_nccl = dist.get_backend() == "nccl"
        if len(devices) > 1 or (is_nccl and next(iter(devices)).type != "cuda"):
            where = ", ".join(map(str, devices))
            raise ValueError(f"{name}: the parameters lie on {where}; move them to one device, with NCCL a GPU")
        for path, part in module.named_modules():
            if getattr(part, "sparse", False) is True:
                raise ValueError(f"{name}: '{path}' has sparse gradients; build it with sparse=False")
        return devices.pop()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._check_batches and torch.is_grad_enabled():
            shapes = (value.shape for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            shape = next(shapes, self._batch_shape)
            if self._batch_shape not in (None, shape):
                raise ValueError(
                    f"this batch has shape {tuple(shape)}, the first had {tuple(self._batch_shape)}: all ranks weigh "
                    "alike in the mean of gradients; drop an incomplete last batch, or give check_batches=False if "
                    "every rank changes shape in the same step"
                )
            self._batch_shape = shape
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here only add to the local gradients; the first one outside sends the sum."""
        before, self._synchronizes = self._synchronizes, False
        try:
            yield
        finally:
            self._synchronizes = before

    def _on_gradient(self, index: int, parameter: nn.Parameter) -> None:
        if not self._synchronizes:
            return
        if self._arrived[index]:
            raise RuntimeError(
                "a second backward pass: call finish_gradient_synchronization() after each, or put all but the last of "
                "a step under no_sync()"
            )
        self._arrived[index] = 1
        self._gradient_arrived(index)

    def _gradient_arrived(self, index: int) -> None:
        """For wrappers that communicate during backward."""

    @torch.no_grad()
    def finish_gradient_synchronization(self) -> None:
        """Leave the mean over ranks in every .grad. Once a step, in every rank, after backward and before clipping.

        Only a rank that left a parameter unused waits for the GPU, to learn whether the others did.
        """
        if not self._batch_agreed:
            shape = None if self._batch_shape is None else tuple(self._batch_shape)
            check_same_everywhere(str(shape), "the shape of the batch", "drop an incomplete last batch")
            self._batch_agreed = True
        self._synchronize()
        self._arrived = bytearray(len(self.trained))

    def _synchronize(self) -> None:
        used, flags = self._use()
        self._average()
        self._transport.average([flags], async_op=False)
        self._drop_unused(used, flags)

    def _average(self) -> None:
        raise NotImplementedError

    def _use(self) -> tuple[list[bool], Tensor]:
        """Which parameters this rank used, and the same as flags to average. The others get zeros to take part with."""
        used = [parameter.grad is not None for parameter in self.trained]
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        return used, shards.flags_of(used, self._device)

    def _drop_unused(self, used: list[bool], flags: Tensor) -> None:
        """After averaging the flags: .grad of a parameter that no rank used becomes None."""
        for parameter, anywhere in zip(self.trained, shards.used_anywhere(used, flags), strict=True):
            if not anywhere:
                parameter.grad = None


def make_replicas(module: nn.Module) -> None:
    """Give the module rank 0's parameters and buffers. ValueError, in every process, if one's module is another."""
    lines = [f"buffer {name} {tuple(buffer.shape)} {buffer.dtype}" for name, buffer in module.named_buffers()]
    for name, parameter in module.named_parameters():
        lines.append(f"{name} {tuple(parameter.shape)} {parameter.dtype}{' frozen' * (not parameter.requires_grad)}")
    check_same_everywhere("\n".join(lines), "the model")
    broadcast_from_rank0([*module.parameters(), *module.buffers()])


class Naive(DataParallel):
    """After backward, one blocking all-reduce a parameter."""

    def _average(self) -> None:
        for parameter in self.trained:
            self._transport.average([_dense(parameter)], async_op=False)


class Flat(DataParallel):
    """After backward, all gradients of a dtype in one buffer and one all-reduce; the gradients stay in the buffer."""

    def _average(self) -> None:
        for dtype in dict.fromkeys(parameter.dtype for parameter in self.trained):
            parameters = [parameter for parameter in self.trained if parameter.dtype == dtype]
            buffer, views = _pack([parameter.grad for parameter in parameters], dtype)
            for parameter, view in zip(parameters, views, strict=True):
                parameter.grad = view
            self._transport.average([buffer], async_op=False)


class _Bucket:
    """Parameters of one dtype whose gradients travel together."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        self.reset()

    def reset(self) -> None:
        self.missing = len(self.parameters)  # gradients that this step's backward has not delivered yet
        self.sent: list[Tensor] = []  # what the collective works on, kept until it has ended
        self.views: list[Tensor] = []  # the gradients therein; after them, in the last bucket, the parameters used
        self.work: Any = None  # the collective


class FlashDDP(DataParallel):
    """Buckets of gradients, averaged while backward goes on.

    The first step reduces after backward, and only records the order in which gradients arrive; rank 0's order then
    fills the buckets of all ranks. From the second on, a full bucket leaves at once, after those before it: all ranks
    must start collectives in one order, so a bucket that waits for a parameter unused on this rank holds back those
    after it until finish_gradient_synchronization(), which makes the current stream, not the host, wait for all.

    Args:
        bucket_size_mb: in 10^6 bytes of gradients as they travel: a bucket is full once it holds that many; 0: a
            bucket a parameter; None: BUCKET_MB of the transport.
        layout: "grouped" or "flat", see above.
        transport: "nccl" (on a CPU, Gloo); "copy_engine", for GPUs of one machine; or "auto": copy engines where they
            can be had and no option of NCCL is given.
        communication_dtype: gradients travel in it (bf16: half the bytes, 8 bits before the sum); None: their own.
        max_ctas: a bound on a NCCL kernel's blocks, each of which takes an SM from backward; None: NCCL's own.
        high_priority: NCCL's kernels go before backward's when both wait for an SM.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        bucket_size_mb: float | None = None,
        layout: str = "grouped",
        transport: str = "nccl",
        communication_dtype: torch.dtype | None = None,
        max_ctas: int | None = None,
        high_priority: bool = False,
        check_batches: bool = True,
    ):
        if bucket_size_mb is not None and not bucket_size_mb >= 0:
            raise ValueError(f"bucket_size_mb is {bucket_size_mb}; it must be 0 (a bucket a parameter) or more")
        for name, value, known in (("layout", layout, LAYOUTS), ("transport", transport, TRANSPORTS)):
            if value not in known:
                raise ValueError(f"{name} is '{value}'; it must be {' or '.join(known)}")
        if communication_dtype is not None and not communication_dtype.is_floating_point:
            raise ValueError(f"communication_dtype is {communication_dtype}; give a floating-point dtype, or None")
        super().__init__(module, check_batches=check_batches)
        is_tuned = max_ctas is not None or high_priority
        if is_tuned and (transport == "copy_engine" or dist.get_backend() != "nccl"):
            raise ValueError("max_ctas and high_priority are NCCL's; leave them out, or give transport='nccl' on GPUs")
        if is_tuned:
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=high_priority)
            if max_ctas is not None:
                options.config.max_ctas = max_ctas
            self._transport = AllReduce(dist.new_group(backend="nccl", pg_options=options))
        if transport == "auto":
            reached = not is_tuned and copy_engine.everywhere(self._device)
            transport = "copy_engine" if reached else "nccl"
        if transport == "copy_engine":
            # A small model needs no pieces larger than itself.
            whole_mb = sum(parameter.nbytes for parameter in self.trained) / 1e6
            self._transport = CopyEngine(self._device, piece_mb=min(copy_engine.PIECE_MB, whole_mb))
        self.transport = transport
        self.bucket_size_mb = BUCKET_MB[transport] if bucket_size_mb is None else bucket_size_mb
        self._in_place = layout == "grouped"
        self._communication_dtype = communication_dtype
        self._arrivals: list[int] = []  # of the first backward pass
        self._bucket_of: dict[int, _Bucket] = {}  # by a parameter's index; empty until the first step's end
        self._buckets: list[_Bucket] = []  # in the order in which they leave
        self._sent: list[_Bucket] = []  # the first of them, which have left in this step

    @property
    def extra_bytes(self) -> int:
        """GPU memory that torch's allocator does not count: what copy engines share."""
        return self._transport.memory_bytes

    @property
    def buckets(self) -> list[list[nn.Parameter]]:
        """The parameters of each bucket, in the order in which they leave; empty before the first step's end."""
        return [list(bucket.parameters) for bucket in self._buckets]

    def _gradient_arrived(self, index: int) -> None:
        if not self._bucket_of:
            self._arrivals.append(index)
            return
        bucket = self._bucket_of[index]
        bucket.missing -= 1
        while len(self._sent) < len(self._buckets) and self._buckets[len(self._sent)].missing == 0:
            bucket = self._buckets[len(self._sent)]
            # The last one has waited for all: every parameter of this rank was used.
            self._send(bucket, self._use()[1] if bucket is self._buckets[-1] else None)

    def _send(self, bucket: _Bucket, flags: Tensor | None) -> None:
        """Start averaging a bucket; the last one takes along which parameters this rank used."""
        self._sent.append(bucket)
        gradients = [_dense(parameter) for parameter in bucket.parameters]
        own_dtype = gradients[0].dtype
        dtype = self._communication_dtype or own_dtype
        if flags is not None:
            gradients.append(flags.to(own_dtype))
        if self._in_place and dtype == own_dtype:
            bucket.sent = bucket.views = gradients
        else:
            buffer, bucket.views = _pack(gradients, dtype)
            bucket.sent = [buffer]
            if dtype == own_dtype:
                for parameter, view in zip(bucket.parameters, bucket.views, strict=flags is None):
                    parameter.grad = view
        bucket.work = self._transport.average(bucket.sent)

    def _synchronize(self) -> None:
        if not self._buckets:
            self._make_buckets()
        left = self._buckets[len(self._sent) :]
        if left:
            used, flags = self._use()
            for bucket in left:
                self._send(bucket, flags if bucket is left[-1] else None)
        closed = self._transport.close()
        for bucket in self._buckets:
            bucket.work.wait()
            if bucket.views[0].dtype != bucket.parameters[0].dtype:
                gradients = [parameter.grad for parameter in bucket.parameters]
                torch._foreach_copy_(gradients, bucket.views[: len(gradients)])
        if closed is not None:
            closed.wait()
        if left:
            self._drop_unused(used, self._buckets[-1].views[-1])
        for bucket in self._buckets:
            bucket.reset()
        self._sent.clear()

    def _make_buckets(self) -> None:
        """Cut rank 0's order of arrival into buckets. What did not arrive there comes last, later registered first."""
        order = gather_objects(list(dict.fromkeys([*self._arrivals, *reversed(range(len(self.trained)))])))[0]
        parts: list[list[int]] = []
        filling: dict[torch.dtype, tuple[list[int], int]] = {}  # the bucket that a dtype fills, and its bytes
        for index in order:
            parameter = self.trained[index]
            size = parameter.numel() * (self._communication_dtype or parameter.dtype).itemsize
            part, filled = filling.get(parameter.dtype, ([], 0))
            if not part or filled >= self.bucket_size_mb * 1e6:
                part, filled = [], 0
                parts.append(part)
            part.append(index)
            filling[parameter.dtype] = part, filled + size
        parts.sort(key=lambda part: order.index(part[-1]))  # a bucket leaves when its last gradient is there
        self._buckets = [_Bucket([self.trained[index] for index in part]) for part in parts]
        self._bucket_of = {index: bucket for part, bucket in zip(parts, self._buckets, strict=True) for index in part}


class Overlap(FlashDDP):
    """One asynchronous all-reduce a parameter, from hooks: FlashDDP with a bucket a parameter."""

    def __init__(self, module: nn.Module, **options: Any):
        super().__init__(module, bucket_size_mb=0, **options)


class TorchDDP(nn.parallel.DistributedDataParallel):
    """torch's DistributedDataParallel with the interface of the wrappers here; gradients are views of its buckets.

    Args:
        bucket_size_mb: in units of 2^20 bytes, as torch counts.
        find_unused: search each pass's graph for parameters that it did not use; without it, one such is an error.
        communication_dtype: torch.bfloat16 or torch.float16: gradients travel in it; None: their own.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        bucket_size_mb: float = 25.0,
        find_unused: bool = False,
        communication_dtype: torch.dtype | None = None,
    ):
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        hooks = {torch.bfloat16: default_hooks.bf16_compress_hook, torch.float16: default_hooks.fp16_compress_hook}
        if communication_dtype not in (None, *hooks):
            raise ValueError(f"torch_ddp: communication_dtype is {communication_dtype}; give bfloat16, float16 or None")
        if communication_dtype == torch.bfloat16 and dist.get_backend() != "nccl":
            raise ValueError("torch_ddp communicates in bfloat16 with NCCL only, on GPUs; give float16 or None")
        make_replicas(module)  # torch before 2.13 leaves buffers alone where it does not send them at each step
        is_new = "forward_sync_buffers" in inspect.signature(nn.parallel.DistributedDataParallel).parameters
        device = next(module.parameters()).device
        super().__init__(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            bucket_cap_mb=bucket_size_mb,
            gradient_as_bucket_view=True,
            find_unused_parameters=find_unused,
            **{"forward_sync_buffers" if is_new else "broadcast_buffers": False},  # not at each step
        )
        if communication_dtype is not None:
            self.register_comm_hook(None, hooks[communication_dtype])

    def finish_gradient_synchronization(self) -> None:
        """Nothing: torch's wrapper ends in backward."""


def _dense(parameter: nn.Parameter) -> Tensor:
    if not parameter.grad.is_contiguous():
        parameter.grad = parameter.grad.contiguous()
    return parameter.grad


def _pack(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Copies of the tensors in one new buffer, and its views that have their shapes. Gaps for alignment are zeroed."""
    unit = _ALIGNMENT // dtype.itemsize
    sizes = [-(-tensor.numel() // unit) * unit for tensor in tensors]
    buffer = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device)
    views = []
    for piece, tensor in zip(buffer.split(sizes), tensors, strict=True):
        piece[tensor.numel() :].zero_()
        views.append(piece[: tensor.numel()].view_as(tensor))
    torch._foreach_copy_(views, list(tensors))
    return buffer, views
