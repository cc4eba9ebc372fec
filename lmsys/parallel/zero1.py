"""ZeRO-1: every rank keeps the optimizer's state of its part of the parameters, updates that part, and gets the rest from the others.

Source: Rajbhandari et al., ZeRO, arXiv 1910.02054, section 5.1 (P_os) and, with reduce_scatter_gradients, 5.2 (P_os+g).
ShardedOptimizer wraps any optimizer of torch's interface. Parameters lie in flat buckets, of which they are views; a bucket's
update is followed at once by the all-gather of that bucket, in place, so that nothing is copied and the update of one bucket
runs while another travels.

partition says what a part is:
    elements    each bucket is cut evenly, through parameters where need be, so that state is balanced to the padding of a
                bucket. The inner optimizer sees flat slices, so it must be elementwise (SGD, Adam, AdamW, ...): slices then
                get what whole parameters would.
    parameters  whole parameters, greedily, largest first. For optimizers that look at a parameter's shape (Adafactor, Muon).
                A parameter larger than a rank's fair share cannot be balanced, and is warned of.
    None        elements for an optimizer that proves elementwise in a trial on 24 random numbers, else parameters.

step() returns when the all-gathers are enqueued before all that follows on the GPU's stream (on a CPU, when they are done):
a module may read a parameter in another's forward, as a tied head does, so no hook knows when it is first needed.
What stays exposed of communication is then about one all-gather of the model less the update, per step.

Limits: a parameter must keep its storage (cast and move the module before); an optimizer whose step needs a closure
(LBFGS) is refused.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lmsys.parallel import shards
from lmsys.parallel.group import check_same_everywhere
from lmsys.parallel.hooks import on_gradient
from lmsys.parallel.shards import Shard, align

PARTITIONS = ("elements", "parameters")


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer whose state is spread over the ranks of a group; without a group, the plain optimizer on flat parameters.

    To be made after the module is wrapped, in the same order of parameters on every rank. What is trained becomes rank 0's.
    All ranks call step, clip_grad_norm_ and everything that saves or loads. Schedulers and zero_grad work as ever.

    Args:
        params: parameters or groups, as any optimizer takes them. Those that are frozen stay outside.
        optimizer_cls, **kwargs: the optimizer and its options.
        partition: elements, parameters, or None for what the optimizer allows.
        bucket_size_mb: what travels as one message (times the ranks, for whole parameters), in MiB.
        reduce_scatter_gradients: average gradients here, each rank receiving those of its part alone, instead of in the
            wrapper, which must then not communicate: run every backward pass under its no_sync(), and all but the last
            before a step under this optimizer's no_sync() too. A bucket's gradients travel when the last of them is there.
        group: the ranks; None: all.
    Raises:
        ValueError: an option, an optimizer that cannot be sharded so, or parameters that differ between ranks.
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer_cls: type[torch.optim.Optimizer],
        *,
        partition: str | None = None,
        bucket_size_mb: float = 100.0,
        reduce_scatter_gradients: bool = False,
        group: dist.ProcessGroup | None = None,
        **kwargs: Any,
    ):
        if partition not in (None, *PARTITIONS):
            raise ValueError(f"partition is {partition!r}; give {' or '.join(PARTITIONS)}, or None to choose")
        if not bucket_size_mb > 0:
            raise ValueError(f"bucket_size_mb is {bucket_size_mb}; it must be above 0")
        if _needs_closure(optimizer_cls):
            raise ValueError(
                f"{optimizer_cls.__name__} evaluates the loss of all parameters within a step; it cannot be sharded"
            )
        groups = _unique(params)
        entries = [entry for group in groups for entry in group["params"]]
        if not entries:
            raise ValueError("the optimizer got no parameters")
        first = entries[0][1] if isinstance(entries[0], tuple) else entries[0]
        defaults, elementwise = _try_out(optimizer_cls, first.device, kwargs)
        if partition == "elements" and not elementwise:
            raise ValueError(
                f"{optimizer_cls.__name__} updates slices of a parameter differently from the whole; use partition='parameters'"
            )
        self.partition = partition or ("elements" if elementwise else "parameters")
        self.reduce_scatter_gradients = reduce_scatter_gradients
        self._make = lambda group: optimizer_cls([group], **kwargs)
        self._group = group
        self._world_size = dist.get_world_size(group) if dist.is_initialized() else 1
        self._rank = dist.get_rank(group) if dist.is_initialized() else 0
        if self._rank < 0:
            raise ValueError("this process is not a member of the group that the optimizer was given")
        self._bucket_bytes = bucket_size_mb * 2**20
        self._buckets: list[_Bucket] = []
        self._frozen: list[Tensor] = []
        self._loads = [0] * self._world_size  # elements a rank owns
        self._exchange = _GradientExchange(self._rank, self._world_size, group)
        self._initializing = True
        super().__init__(groups, defaults)
        self._initializing = False
        self._check_balance()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with its own options, as any optimizer does. All ranks call it."""
        (param_group,) = _unique([param_group])
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        check_same_everywhere(
            "\n".join(f"{tuple(p.shape)} {p.dtype} {p.requires_grad}" for p in added["params"]),
            f"parameter group {len(self.param_groups) - 1} of the optimizer",
            self._group,
        )
        kinds: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
        for parameter in added["params"]:
            if parameter.requires_grad:
                kinds.setdefault((parameter.device, parameter.dtype), []).append(parameter)
            else:
                self._frozen.append(parameter)
        for parameters in kinds.values():
            owners = self._assign(parameters) if self.partition == "parameters" else None
            for run in self._runs(parameters):
                bucket = _Bucket(run, owners, self._rank, self._world_size, added)
                if self._world_size > 1:
                    dist.broadcast(bucket.flat, group=self._group, group_src=0)
                if bucket.leaves:
                    options = {key: value for key, value in added.items() if key not in ("params", "param_names")}
                    bucket.inner = self._make({"params": [leaf.tensor for leaf in bucket.leaves], **options})
                    bucket.pushed = options
                self._buckets.append(bucket)
                if self.reduce_scatter_gradients:
                    self._exchange.add(bucket)
        if not self._initializing:
            self._check_balance()

    def _runs(self, parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """Consecutive parameters of up to a bucket's bytes, or one larger parameter."""
        limit = self._bucket_bytes * (self._world_size if self.partition == "parameters" else 1)
        run: list[nn.Parameter] = []
        size = 0
        for parameter in parameters:
            if run and size + parameter.nbytes > limit:
                yield run
                run, size = [], 0
            run.append(parameter)
            size += parameter.nbytes
        yield run

    def _assign(self, parameters: list[nn.Parameter]) -> dict[int, int]:
        """Greedy: the largest parameter left goes to the rank with the least. id(parameter) -> rank."""
        owners = {}
        for parameter in sorted(parameters, key=lambda p: -p.numel()):
            owner = min(range(self._world_size), key=self._loads.__getitem__)
            owners[id(parameter)] = owner
            self._loads[owner] += parameter.numel()
        return owners

    def _check_balance(self) -> None:
        if self.partition == "parameters" and self._rank == 0:
            mean = sum(self._loads) / self._world_size
            if max(self._loads) > 1.05 * mean:
                warnings.warn(
                    f"whole parameters leave one rank with {max(self._loads) / mean:.2f} times the mean of the optimizer's "
                    "state; an elementwise optimizer can use partition='elements', which is balanced",
                    stacklevel=3,
                )

    # --- A step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update this rank's part and get the others'. Returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_parameters()
        if self.reduce_scatter_gradients:
            self._exchange.finish()
        works: list[dist.Work] = []
        for bucket in self._buckets:
            bucket.update(take_gradients=not self.reduce_scatter_gradients)
            if self._world_size > 1:
                works += self._send(bucket)
        for work in works:
            work.wait()
        self._exchange.finished = False
        return loss

    def _send(self, bucket: _Bucket) -> list[dist.Work]:
        """Start to share what each rank updated: one all-gather, or one broadcast from each owner of whole parameters."""
        if self.partition == "elements":
            start, stop = bucket.shares[self._rank]
            return [shards.all_gather(bucket.flat, bucket.flat[start:stop], self._group)]
        return [
            dist.broadcast(bucket.flat[start:stop], group=self._group, group_src=rank, async_op=True)
            for rank, (start, stop) in enumerate(bucket.shares)
            if start < stop
        ]

    def _check_parameters(self) -> None:
        if any(parameter.requires_grad for parameter in self._frozen):
            raise ValueError(
                "a parameter that was frozen when the optimizer was made now requires a gradient; make the optimizer anew"
            )
        for bucket in self._buckets:
            for parameter, address in zip(bucket.parameters, bucket.addresses, strict=True):
                if parameter.data_ptr() != address:
                    raise ValueError(
                        f"a parameter of shape {tuple(parameter.shape)} has moved since the optimizer was made (a cast, a "
                        "device, a new .data); cast and move the module before its optimizer is made"
                    )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, those of this rank's part included."""
        super().zero_grad(set_to_none)
        for leaf in self._leaves():
            if not leaf.is_whole:
                leaf.tensor.grad = None
        self._exchange.finished = False

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes within only accumulate. For all but the last before a step, with reduce_scatter_gradients."""
        before, self._exchange.paused = self._exchange.paused, True
        try:
            yield
        finally:
            self._exchange.paused = before

    def finish_gradient_synchronization(self) -> None:
        """With reduce_scatter_gradients, wait for the averaged gradients of this rank's part, as clipping and step() do."""
        if self.reduce_scatter_gradients:
            self._exchange.finish()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their 2-norm over the whole model is at most max_norm. max_norm 0 or less: measure only.

        Returns:
            the norm before clipping, the same on every rank, a scalar on the device, for which nothing has waited.
        """
        if not self.reduce_scatter_gradients:  # every rank has all of them
            owned = [parameter.grad for bucket in self._buckets for parameter in bucket.parameters]
        else:
            self._exchange.finish()
            owned = [leaf.tensor.grad for leaf in self._leaves()]
        gradients = [gradient for gradient in owned if gradient is not None]
        if gradients:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        else:
            norm = torch.zeros((), device=self._buckets[0].flat.device)
        if self.reduce_scatter_gradients and self._world_size > 1:
            total = norm.square()
            dist.all_reduce(total, group=self._group)
            norm = total.sqrt()
        if max_norm > 0 and gradients:
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def close(self) -> None:
        """Take this optimizer's hooks off the parameters, so that another may follow it."""
        self._exchange.close()

    def state_nbytes(self) -> int:
        """Bytes of optimizer state on this rank's device."""
        return sum(
            value.nbytes
            for leaf in self._leaves()
            for value in leaf.state.values()
            if isinstance(value, Tensor) and value.device == leaf.tensor.device
        )

    def _leaves(self) -> Iterator[_Leaf]:
        for bucket in self._buckets:
            yield from bucket.leaves

    # --- State ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Refused: no rank has the whole state."""
        raise RuntimeError(
            "no rank holds the whole state: call full_state_dict() or save_sharded(folder) on all ranks instead"
        )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """load_full_state_dict."""
        self.load_full_state_dict(state_dict)

    def full_state_dict(self) -> dict[str, Any]:
        """The state_dict of the plain optimizer, on rank 0 and its CPU; on other ranks, one without states.

        All ranks call it. It loads into the plain optimizer, and into a sharded one at any number of ranks.
        """
        device = self._buckets[0].flat.device if self._buckets else torch.device("cpu")
        return self._packed() | {"state": shards.gather_states(self._states(), self._group, device)}

    def load_full_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the options and this rank's part of a whole state_dict, which every rank is given. Nothing is communicated.

        Raises:
            ValueError: it is of other groups or parameters.
        """
        self._load(
            state_dict["param_groups"],
            [shards.cut_state(state_dict["state"].get(shard.index, {}), shard) for shard in self._shards()],
        )

    def save_sharded(self, folder: str | Path) -> None:
        """Write the state to a folder, each rank its own part (shards.save_pieces). All ranks call it."""
        groups = self._packed()["param_groups"]
        shards.save_states(self._states(), {"param_groups": groups}, folder, self._group)

    def load_sharded(self, folder: str | Path) -> None:
        """Read what save_sharded wrote, at any number of ranks. All ranks call it.

        Raises:
            ValueError: nothing there, or it is of other groups or parameters.
        """
        states, shared = shards.load_states(self._shards(), folder, self._group)
        self._load(shared["param_groups"], states)

    def _packed(self) -> dict[str, Any]:
        """The state_dict without states: options and the indices of parameters."""
        return super().state_dict() | {"state": {}}

    def _shards(self) -> list[Shard]:
        order = (parameter for group in self.param_groups for parameter in group["params"])
        indices = {id(parameter): index for index, parameter in enumerate(order)}
        return [
            Shard(indices[id(leaf.parameter)], leaf.parameter.shape, leaf.start, leaf.tensor) for leaf in self._leaves()
        ]

    def _states(self) -> list[tuple[Shard, dict[str, Any]]]:
        return [(shard, leaf.state) for shard, leaf in zip(self._shards(), self._leaves(), strict=True)]

    def _load(self, groups: list[dict[str, Any]], states: list[dict[str, Any]]) -> None:
        """states: one for each of _leaves()."""
        given, own = ([len(group["params"]) for group in some] for some in (groups, self.param_groups))
        if given != own:
            raise ValueError(
                f"the state is of groups of {given} parameters and this optimizer's have {own}; make the optimizer as the saved one was"
            )
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({key: value for key, value in saved.items() if key not in ("params", "param_names")})
        remaining = iter(states)
        for bucket in self._buckets:
            if bucket.inner is not None:
                bucket.push_options()
                packed = bucket.inner.state_dict()["param_groups"]
                filled = {index: next(remaining) for index in range(len(bucket.leaves))}
                bucket.inner.load_state_dict(
                    {"state": {index: state for index, state in filled.items() if state}, "param_groups": packed}
                )


# --- Buckets --------------------------------------------------------------------------------------


@dataclass
class _Leaf:
    """What the inner optimizer updates: elements [start, stop) of a parameter, or the parameter itself where that is all."""

    parameter: nn.Parameter
    start: int
    stop: int
    at: int  # where it starts in the bucket
    tensor: nn.Parameter
    bucket: _Bucket

    @property
    def is_whole(self) -> bool:
        return self.tensor is self.parameter

    @property
    def state(self) -> dict[str, Any]:
        return self.bucket.inner.state.get(self.tensor, {})


class _Bucket:
    """Parameters of one group in one flat buffer, of which they become views, and this rank's leaves of it.

    Attributes:
        flat: (elements,), each parameter at a multiple of shards.ALIGNMENT.
        shares: [start, stop) of each rank in flat.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        owners: Mapping[int, int] | None,
        rank: int,
        world_size: int,
        options: dict[str, Any],
    ):
        if owners is not None:
            parameters = sorted(parameters, key=lambda parameter: owners[id(parameter)])
        self.parameters = parameters
        self.options = options
        self.pushed: dict[str, Any] = {}
        self.inner: torch.optim.Optimizer | None = None
        self.offsets: list[int] = []
        size = 0
        ends = [0] * world_size  # of each rank's whole parameters
        for parameter in parameters:
            self.offsets.append(size)
            size = align(size + parameter.numel())
            if owners is not None:
                ends[owners[id(parameter)]] = size
        if owners is None:
            size = align(size, world_size * shards.ALIGNMENT)
            share = size // world_size
            self.shares = [(r * share, (r + 1) * share) for r in range(world_size)]
        else:
            self.shares = []
            start = 0
            for end in ends:
                self.shares.append((start, max(start, end)))
                start = max(start, end)
        first = parameters[0]
        self.flat = torch.zeros(size, dtype=first.dtype, device=first.device)
        for parameter, view in zip(parameters, self.views(self.flat), strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        self.addresses = [parameter.data_ptr() for parameter in parameters]
        self.leaves = list(self._cut(*self.shares[rank]))

    def views(self, flat: Tensor) -> list[Tensor]:
        """A buffer like flat as tensors like the parameters."""
        return [
            flat[offset : offset + parameter.numel()].view(parameter.shape)
            for offset, parameter in zip(self.offsets, self.parameters, strict=True)
        ]

    def _cut(self, low: int, high: int) -> Iterator[_Leaf]:
        """The leaves of [low, high) of the buffer."""
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            start, stop = max(low - offset, 0), min(high - offset, parameter.numel())
            if start < stop:
                whole = stop - start == parameter.numel()
                tensor = parameter if whole else nn.Parameter(self.flat[offset + start : offset + stop])
                yield _Leaf(parameter, start, stop, offset + start, tensor, self)

    def push_options(self) -> None:
        """Give the inner optimizer the options that changed: a scheduler sets those of the outer groups."""
        inner = self.inner.param_groups[0]
        for key, value in self.options.items():
            if key not in ("params", "param_names") and (key not in self.pushed or self.pushed[key] is not value):
                inner[key] = self.pushed[key] = value

    def update(self, take_gradients: bool) -> None:
        """The inner optimizer's step. take_gradients: from the parameters; else the leaves have theirs."""
        if self.inner is None:
            return
        self.push_options()
        if take_gradients:
            for leaf in self.leaves:
                if not leaf.is_whole and leaf.parameter.grad is not None:
                    leaf.tensor.grad = leaf.parameter.grad.reshape(-1)[leaf.start : leaf.stop]
        self.inner.step()
        if take_gradients:
            for leaf in self.leaves:
                if not leaf.is_whole:
                    leaf.tensor.grad = None  # a view that would keep the gradient alive


# --- Gradients ------------------------------------------------------------------------------------


@dataclass
class _Flight:
    """A bucket's gradients on their way. They stay here until they have been waited for: then their memory may be reused."""

    bucket: _Bucket
    gradients: Tensor
    mean: Tensor  # of this rank's share
    works: list[dist.Work] = field(default_factory=list)


class _GradientExchange:
    """Reduce-scatters each bucket's gradients when the last of them has arrived, in an order that all ranks share.

    The order is that in which buckets became complete on rank 0 in the first backward pass.
    """

    def __init__(self, rank: int, world_size: int, group: dist.ProcessGroup | None):
        self.rank, self.world_size, self.group = rank, world_size, group
        self.paused = False
        self.finished = False  # the leaves have the gradients of this step
        self.buckets: list[_Bucket] = []
        self.order: list[_Bucket] | None = None
        self.completed: list[_Bucket] = []  # in the first backward pass
        self.missing: dict[_Bucket, set[int]] = {}  # parameters without a gradient yet, by id
        self.flights: list[_Flight] = []
        self.used: set[int] = set()  # parameters whose gradient has left, by id
        self.hooks: list[Any] = []

    def add(self, bucket: _Bucket) -> None:
        self.buckets.append(bucket)
        self.order, self.completed = None, []
        self._expect(bucket)
        for parameter in bucket.parameters:
            self.hooks.append(on_gradient(parameter, self._arrived, len(self.buckets) - 1))

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def _expect(self, bucket: _Bucket) -> None:
        self.missing[bucket] = {id(parameter) for parameter in bucket.parameters}

    def _arrived(self, index: int, parameter: Tensor) -> None:
        if self.paused:
            return
        bucket = self.buckets[index]
        if any(flight.bucket is bucket for flight in self.flights):
            raise RuntimeError(
                "a second backward pass before the step, and the first one's gradients are on their way; run all but the "
                "last under the optimizer's no_sync()"
            )
        self.finished = False
        missing = self.missing[bucket]
        missing.discard(id(parameter))
        if missing:
            return
        if self.order is None:
            self.completed.append(bucket)
            return
        while len(self.flights) < len(self.order) and not self.missing[self.order[len(self.flights)]]:
            self._launch(self.order[len(self.flights)])

    @torch.no_grad()
    def _launch(self, bucket: _Bucket) -> None:
        flat = torch.empty_like(bucket.flat)
        present = [
            (view, parameter.grad)
            for view, parameter in zip(bucket.views(flat), bucket.parameters, strict=True)
            if parameter.grad is not None
        ]
        if len(present) < len(bucket.parameters):
            flat.zero_()
        if present:
            torch._foreach_copy_(*map(list, zip(*present, strict=True)))
        for parameter in bucket.parameters:
            if parameter.grad is not None:
                self.used.add(id(parameter))
                parameter.grad = None
        start, stop = bucket.shares[self.rank]
        if self.world_size == 1:
            self.flights.append(_Flight(bucket, flat, flat))
        elif all(stop - start == high - low for low, high in bucket.shares):
            mean = flat.new_empty(stop - start)
            work = shards.reduce_scatter_mean(mean, flat, self.group)
            self.flights.append(_Flight(bucket, flat, mean, [work]))
        else:
            operation = shards.mean_operation(flat, self.group)
            works = [
                dist.reduce(flat[low:high], group_dst=rank, op=operation, group=self.group, async_op=True)
                for rank, (low, high) in enumerate(bucket.shares)
                if low < high
            ]
            self.flights.append(_Flight(bucket, flat, flat[start:stop], works))

    @torch.no_grad()
    def finish(self) -> None:
        """Launch what is left and give every leaf the mean gradient. Does nothing when that has been done for this step."""
        if self.finished:
            return
        if self.order is None:
            self.order = self._agree()
        for bucket in self.order[len(self.flights) :]:
            self._launch(bucket)
        unused = self._unused()
        for flight in self.flights:
            for work in flight.works:
                work.wait()
            start, _ = flight.bucket.shares[self.rank]
            for leaf in flight.bucket.leaves:
                if id(leaf.parameter) in unused:
                    continue
                at = leaf.at - start
                gradient = flight.mean[at : at + leaf.tensor.numel()].view(leaf.tensor.shape)
                leaf.tensor.grad = gradient if leaf.tensor.grad is None else leaf.tensor.grad + gradient
            self._expect(flight.bucket)
        self.flights = []
        self.used = set()
        self.finished = True

    def _unused(self) -> set[int]:
        """Parameters that no rank used, by id. Only a rank that left one unused waits to read that."""
        parameters = [parameter for bucket in self.buckets for parameter in bucket.parameters]
        here = [id(parameter) in self.used for parameter in parameters]
        flags = torch.ones(len(here), device=self.buckets[0].flat.device)
        if not all(here):
            flags.copy_(torch.tensor(here, dtype=flags.dtype))
        if self.world_size > 1:
            dist.all_reduce(flags, group=self.group)
        somewhere = here if all(here) else (flags > 0).tolist()
        return {id(parameter) for parameter, used in zip(parameters, somewhere, strict=True) if not used}

    def _agree(self) -> list[_Bucket]:
        """Rank 0's order, buckets that were not complete there last."""
        seen = [self.buckets.index(bucket) for bucket in self.completed]
        order = [seen + [index for index in range(len(self.buckets)) if index not in seen]]
        if self.world_size > 1:
            dist.broadcast_object_list(order, group=self.group, group_src=0)
        return [self.buckets[index] for index in order[0]]


# --- The inner optimizer --------------------------------------------------------------------------


def _unique(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Parameters or groups as groups, in each of which a parameter that is given twice (tied) is once."""
    params = [params] if isinstance(params, (Tensor, dict)) else list(params)
    groups = params if params and isinstance(params[0], dict) else [{"params": params}] if params else []
    unique = []
    for group in groups:
        entries = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        by_id: dict[int, Any] = {}
        for entry in entries:
            by_id.setdefault(id(entry[1] if isinstance(entry, tuple) else entry), entry)
        unique.append({**group, "params": list(by_id.values())})
    return unique


def _needs_closure(optimizer_cls: type[torch.optim.Optimizer]) -> bool:
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _try_out(
    optimizer_cls: type[torch.optim.Optimizer], device: torch.device, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    """The optimizer's defaults, and whether it updates a matrix as it would two flat slices of it.

    Raises:
        what the optimizer raises for its options.
    """
    defaults = optimizer_cls([nn.Parameter(torch.zeros(4, 6, device=device))], **kwargs).defaults
    trial = dict(kwargs)
    if isinstance(trial.get("lr"), (int, float)):
        trial["lr"] = 0.1  # a warm-up may start from 0, where nothing moves
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(4, 6, generator=generator).to(device) for _ in range(3))
    whole = nn.Parameter(start.clone())
    parts = [nn.Parameter(part.clone()) for part in start.view(-1).split(10)]
    reference = optimizer_cls([whole], **trial)
    try:
        sliced = optimizer_cls(parts, **trial)
        for gradient in gradients:
            whole.grad = gradient
            reference.step()
            for part, slice_of in zip(parts, gradient.view(-1).split(10), strict=True):
                part.grad = slice_of
            sliced.step()
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):  # it takes no flat tensors
        return defaults, False
    return defaults, torch.allclose(torch.cat([part.detach() for part in parts]), whole.detach().view(-1), rtol=1e-5)
