"""ZeRO-1: every rank keeps and updates the optimizer's state of its part of the parameters, and gets the rest.

Source: Rajbhandari et al., ZeRO, arXiv 1910.02054, section 5.1 (P_os) and, with reduce_scatter_gradients, 5.2 (P_os+g).
ShardedOptimizer wraps any optimizer of torch's interface. Parameters lie in flat buckets, of which they are views; a
bucket's update is followed at once by the all-gather of that bucket, in place, so that nothing is copied and the update
of one bucket runs while another travels.

partition says what a part is:
    elements    each bucket is cut evenly, through parameters where need be. The inner optimizer sees flat slices, so it
                must be elementwise (SGD, Adam, AdamW, ...).
    parameters  whole parameters, greedily, largest first. For optimizers that look at a parameter's shape (Adafactor,
                Muon). A parameter larger than a rank's fair share cannot be balanced, and is warned of.
    None        elements for an optimizer that proves elementwise in a trial on 24 random numbers, else parameters.

After step() the GPU's stream waits for all parameters, as no hook knows when one is first read: about one all-gather of
the model less the update stays exposed.

Limits: a parameter must keep its storage (cast and move the module before); an optimizer whose step needs a closure
(LBFGS) is refused.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lmsys.parallel import shards
from lmsys.parallel.group import broadcast_from_rank0, check_same_everywhere, current, gather_objects
from lmsys.parallel.shards import FlatLayout, MeanInFlight, Piece


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer whose state is spread over the ranks; without a process group, a plain one on flat parameters.

    To be made after the module is wrapped, in the same order of parameters on every rank. What is trained becomes rank
    0's. All ranks call step, clip_grad_norm_ and everything that saves or loads.

    Args:
        params: parameters or groups, as any optimizer takes them. Those that are frozen stay outside.
        optimizer_cls, **kwargs: the optimizer and its options.
        bucket_size_mb: what travels as one message (times the ranks, for whole parameters), in MiB.
        reduce_scatter_gradients: average gradients here, each rank receiving those of its part alone, instead of in the
            wrapper, which must then not communicate: run every backward pass under its no_sync(), and all but the last
            before a step under this optimizer's no_sync() too. A bucket's gradients travel when its last one is there.
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
        **kwargs: Any,
    ):
        if partition not in (None, "elements", "parameters"):
            raise ValueError(f"partition is {partition!r}; give elements or parameters, or None to choose")
        if not bucket_size_mb > 0:
            raise ValueError(f"bucket_size_mb is {bucket_size_mb}; it must be above 0")
        closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(f"{optimizer_cls.__name__} evaluates the loss within a step; it cannot be sharded")
        groups = _unique(params)
        entries = [entry for group in groups for entry in group["params"]]
        if not entries:
            raise ValueError("the optimizer got no parameters")
        first = entries[0][1] if isinstance(entries[0], tuple) else entries[0]
        defaults, elementwise = _try_out(optimizer_cls, first.device, kwargs)
        if partition == "elements" and not elementwise:
            raise ValueError(f"{optimizer_cls.__name__} is not elementwise; use partition='parameters'")
        self.partition = partition or ("elements" if elementwise else "parameters")
        self.reduce_scatter_gradients = reduce_scatter_gradients
        self._make = lambda group: optimizer_cls([group], **kwargs)
        self._rank, self._world_size = current()
        self._bucket_bytes = bucket_size_mb * 2**20
        self._buckets: list[_Bucket] = []
        self._frozen: list[Tensor] = []
        self._loads = [0] * self._world_size  # elements of the whole parameters that a rank owns
        self._exchange = _GradientExchange()
        super().__init__(groups, defaults)
        imbalance = max(self._loads) * self._world_size / max(sum(self._loads), 1)
        if imbalance > 1.05 and self._rank == 0:
            warnings.warn(
                f"whole parameters leave one rank with {imbalance:.2f} times the mean of the optimizer's state; an "
                "elementwise optimizer can use partition='elements', which is balanced",
                stacklevel=2,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        (param_group,) = _unique([param_group])
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        check_same_everywhere(
            "\n".join(f"{tuple(p.shape)} {p.dtype} {p.requires_grad}" for p in added["params"]),
            f"parameter group {len(self.param_groups) - 1} of the optimizer",
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
                bucket = _Bucket(run, owners, self._make, added, len(self.param_groups) - 1)
                self._buckets.append(bucket)
                if self.reduce_scatter_gradients:
                    self._exchange.add(bucket)

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

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Update this rank's part and get the others'. Returns the closure's loss. kwargs: the inner optimizer's."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_parameters()
        self.finish_gradient_synchronization()
        works = []
        for bucket in self._buckets:
            bucket.update(take_gradients=not self.reduce_scatter_gradients, **kwargs)
            works += bucket.send()
        for work in works:
            work.wait()
        self._exchange.finished = False
        return loss

    def _check_parameters(self) -> None:
        if any(parameter.requires_grad for parameter in self._frozen):
            raise ValueError("a parameter that was frozen when the optimizer was made now is not; make it anew")
        for bucket in self._buckets:
            if [parameter.data_ptr() for parameter in bucket.layout.parameters] != bucket.addresses:
                raise ValueError(
                    "a parameter has moved since the optimizer was made (a cast, a device, a new .data); cast and move "
                    "the module before its optimizer is made"
                )

    def zero_grad(self, set_to_none: bool = True) -> None:
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
        """With reduce_scatter_gradients, wait for the mean gradients of this rank's part, as clipping and step() do."""
        if self.reduce_scatter_gradients:
            self._exchange.finish()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """As shards.clip_gradients; with reduce_scatter_gradients, of this rank's part."""
        self.finish_gradient_synchronization()
        if self.reduce_scatter_gradients:
            tensors = [leaf.tensor for leaf in self._leaves()]
        else:  # every rank has all of them
            tensors = [parameter for bucket in self._buckets for parameter in bucket.layout.parameters]
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        sharded, replicated = (gradients, []) if self.reduce_scatter_gradients else (None, gradients)
        return shards.clip_gradients(sharded, replicated, max_norm, self._buckets[0].flat.device)

    def close(self) -> None:
        """Take this optimizer's hooks off the parameters, so that another may follow it."""
        self._exchange.close()

    def state_nbytes(self) -> int:
        return sum(value.nbytes for _, state in self._states() for value in state.values() if isinstance(value, Tensor))

    def _leaves(self) -> Iterator[_Leaf]:
        for bucket in self._buckets:
            yield from bucket.leaves

    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("no rank holds the whole state: call full_state_dict() or save_sharded(folder) on all ranks")

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.load_full_state_dict(state_dict)

    def full_state_dict(self) -> dict[str, Any]:
        """The plain optimizer's state_dict, on rank 0 and its CPU; on others, one without states. All ranks call it."""
        device = self._buckets[0].flat.device if self._buckets else torch.device("cpu")
        return self._packed() | {"state": shards.gather_states(self._states(), device)}

    def load_full_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the options and this rank's part of a whole state_dict; ValueError where it is of other groups."""
        self._load(state_dict["param_groups"], shards.cut_states(state_dict["state"], self._pieces()))

    def save_sharded(self, folder: str | Path) -> None:
        """Write the state to a folder, each rank its own part (shards.save_pieces). All ranks call it."""
        groups = self._packed()["param_groups"]
        shards.save_states(self._states(), {"param_groups": groups}, folder)

    def load_sharded(self, folder: str | Path) -> None:
        """Read what save_sharded wrote, at any number of ranks. ValueError: nothing there, or of other parameters."""
        states, shared = shards.load_states(self._pieces(), folder)
        self._load(shared["param_groups"], states)

    def _packed(self) -> dict[str, Any]:
        """The state_dict without states: indices of parameters, and options as the inner optimizers left them."""
        options: list[dict[str, Any]] = [{} for _ in self.param_groups]
        for bucket in self._buckets:
            if bucket.inner is not None:
                bucket.push_options()
                options[bucket.group_index] = _options(bucket.inner.param_groups[0])
        everyone = gather_objects(options)  # a rank may have no part of a group
        packed = super().state_dict() | {"state": {}}
        for index, group in enumerate(packed["param_groups"]):
            group |= next((theirs[index] for theirs in everyone if theirs[index]), {})
        return packed

    def _pieces(self) -> list[Piece]:
        """What this rank updates, named by the parameters' indices."""
        order = (parameter for group in self.param_groups for parameter in group["params"])
        names = {id(parameter): str(index) for index, parameter in enumerate(order)}
        return [Piece(names[id(leaf.whole)], leaf.whole.shape, leaf.start, leaf.tensor) for leaf in self._leaves()]

    def _states(self) -> list[tuple[Piece, dict[str, Any]]]:
        states = [bucket.inner.state.get(leaf.tensor, {}) for bucket in self._buckets for leaf in bucket.leaves]
        return list(zip(self._pieces(), states, strict=True))

    def _load(self, groups: list[dict[str, Any]], states: list[dict[str, Any]]) -> None:
        given, own = ([len(group["params"]) for group in some] for some in (groups, self.param_groups))
        if given != own:
            raise ValueError(f"the state is of groups of {given} parameters and this optimizer's have {own}")
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update(_options(saved))
        remaining = iter(states)
        for bucket in self._buckets:
            if bucket.inner is not None:
                bucket.push_options()
                groups = bucket.inner.state_dict()["param_groups"]
                state = {index: next(remaining) for index in range(len(bucket.leaves))}
                state = {index: values for index, values in state.items() if values}
                bucket.inner.load_state_dict({"state": state, "param_groups": groups})


class _Leaf(NamedTuple):
    """What the inner optimizer updates: elements of a parameter from start on, or itself where that is all."""

    whole: nn.Parameter
    start: int
    at: int  # where it starts in this rank's share of the bucket
    tensor: nn.Parameter

    @property
    def is_whole(self) -> bool:
        return self.tensor is self.whole


class _Bucket:
    """Parameters of one group in one flat buffer, of which they become views, and this rank's leaves of it.

    Attributes:
        flat: (elements,), rank 0's values. shares: [start, stop) of each rank in it; own: this rank's.
        is_even: whether all shares are as long, by elements; else each holds whole parameters.
        inner: the optimizer of the leaves, if there are any, with the outer group's options of now and later.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        owners: Mapping[int, int] | None,  # id of a parameter -> rank
        make: Callable[[dict[str, Any]], torch.optim.Optimizer],
        outer: dict[str, Any],
        index: int,
    ):
        rank, world_size = current()
        self.is_even = owners is None
        if owners is not None:
            parameters = sorted(parameters, key=lambda parameter: owners[id(parameter)])
        self.layout = FlatLayout(parameters)
        size = self.layout.size
        if owners is None:
            self.shares = shards.even_shares(size, world_size)
            size = self.shares[-1][1]
        else:  # from a rank's first parameter to the next rank's
            first = {owners[id(p)]: at for p, at in reversed(list(zip(parameters, self.layout.offsets, strict=True)))}
            bounds = [size]
            for owner in reversed(range(world_size)):
                bounds.insert(0, first.get(owner, bounds[0]))
            self.shares = list(itertools.pairwise(bounds))
        self.flat = self.layout.flatten(size)
        broadcast_from_rank0([self.flat])
        for parameter, view in zip(parameters, self.layout.views(self.flat), strict=True):
            parameter.data = view
        self.addresses = [parameter.data_ptr() for parameter in parameters]
        self.own = low, high = self.shares[rank]
        self.leaves: list[_Leaf] = []
        cuts = zip(parameters, self.layout.offsets, self.layout.cut(low, high), strict=True)
        for parameter, at, (start, stop) in cuts:
            if start < stop:
                is_whole = stop - start == parameter.numel()
                tensor = parameter if is_whole else nn.Parameter(self.flat[at + start : at + stop])
                self.leaves.append(_Leaf(parameter, start, at + start - low, tensor))
        self.expect()
        self.outer, self.group_index = outer, index
        self.pushed = _options(outer)  # what inner was given
        tensors = [leaf.tensor for leaf in self.leaves]
        self.inner = make({"params": tensors, **self.pushed}) if tensors else None

    def send(self) -> list[dist.Work]:
        if len(self.shares) == 1:
            return []
        if self.is_even:
            return [shards.all_gather(self.flat, self.flat[slice(*self.own)])]
        return [
            dist.broadcast(self.flat[start:stop], src=rank, async_op=True)
            for rank, (start, stop) in enumerate(self.shares)
            if start < stop
        ]

    def expect(self) -> None:
        """No gradient of the step has come yet."""
        self.missing = {id(parameter) for parameter in self.layout.parameters}  # those without one

    def push_options(self) -> None:
        """Give the inner optimizer the options that changed: a scheduler sets those of the outer groups."""
        inner = self.inner.param_groups[0]
        for key, value in _options(self.outer).items():
            if key not in self.pushed or self.pushed[key] is not value:
                inner[key] = self.pushed[key] = value

    def update(self, take_gradients: bool, **kwargs: Any) -> None:
        """The inner optimizer's step. take_gradients: from the parameters; else the leaves have theirs."""
        if self.inner is None:
            return
        self.push_options()
        cut = [leaf for leaf in self.leaves if take_gradients and not leaf.is_whole]
        for leaf in cut:
            if leaf.whole.grad is not None:
                leaf.tensor.grad = leaf.whole.grad.reshape(-1)[leaf.start : leaf.start + leaf.tensor.numel()]
        self.inner.step(**kwargs)
        for leaf in cut:
            leaf.tensor.grad = None  # a view that would keep the gradient alive


class _GradientExchange:
    """Reduce-scatters a bucket's gradients when the last has arrived, in rank 0's order of the first backward pass."""

    def __init__(self):
        self.paused = False
        self.finished = False  # the leaves have the gradients of this step
        self.buckets: list[_Bucket] = []
        self.order: list[_Bucket] | None = None
        self.completed: list[int] = []  # buckets, in the first backward pass
        self.flights: list[MeanInFlight] = []  # of the first buckets of the order
        self.used: set[int] = set()  # parameters whose gradient has left, by id
        self.hooks: list[Any] = []

    def add(self, bucket: _Bucket) -> None:
        self.buckets.append(bucket)
        self.order, self.completed = None, []
        for parameter in bucket.layout.parameters:
            self.hooks.append(shards.on_gradient(parameter, self._arrived, len(self.buckets) - 1))

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def _arrived(self, index: int, parameter: Tensor) -> None:
        if self.paused:
            return
        bucket = self.buckets[index]
        if self.order is not None and bucket in self.order[: len(self.flights)]:
            raise RuntimeError(
                "a second backward pass before the step; run all but the last under the optimizer's no_sync()"
            )
        self.finished = False
        bucket.missing.discard(id(parameter))
        if self.order is not None:
            while len(self.flights) < len(self.order) and not self.order[len(self.flights)].missing:
                self._launch(self.order[len(self.flights)])
        elif not bucket.missing:
            self.completed.append(index)

    @torch.no_grad()
    def _launch(self, bucket: _Bucket) -> None:
        self.used |= {id(parameter) for parameter in bucket.layout.parameters if parameter.grad is not None}
        gradients = bucket.layout.take_gradients(bucket.flat.numel(), bucket.flat.dtype)
        self.flights.append(MeanInFlight(gradients, bucket.shares))

    @torch.no_grad()
    def finish(self) -> None:
        """Give every leaf the mean gradient, unless that is done for this step."""
        if self.finished:
            return
        if self.order is None:  # rank 0's, buckets that were not complete there last
            order = dict.fromkeys([*self.completed, *range(len(self.buckets))])
            self.order = [self.buckets[index] for index in gather_objects([*order])[0]]
        for bucket in self.order[len(self.flights) :]:
            self._launch(bucket)
        # Where no rank used a parameter there is no gradient. Only a rank that left one unused waits to read that.
        parameters = [parameter for bucket in self.buckets for parameter in bucket.layout.parameters]
        here = [id(parameter) in self.used for parameter in parameters]
        flags = shards.flags_of(here, self.buckets[0].flat.device)
        if current()[1] > 1:
            dist.all_reduce(flags)
        used = {id(p) for p, is_used in zip(parameters, shards.used_anywhere(here, flags), strict=True) if is_used}
        for bucket, flight in zip(self.order, self.flights, strict=True):
            mean = flight.wait()
            for leaf in bucket.leaves:
                if id(leaf.whole) in used:
                    gradient = mean[leaf.at : leaf.at + leaf.tensor.numel()].view(leaf.tensor.shape)
                    leaf.tensor.grad = gradient if leaf.tensor.grad is None else leaf.tensor.grad + gradient
            bucket.expect()
        self.flights, self.used = [], set()
        self.finished = True


def _unique(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Parameters or groups as groups, in each of which a parameter that is given twice (tied) is once."""
    params = [params] if isinstance(params, (Tensor, dict)) else list(params)
    unique = []
    for group in params if params and isinstance(params[0], dict) else [{"params": params}]:
        by_id: dict[int, Any] = {}
        for entry in [group["params"]] if isinstance(group["params"], Tensor) else group["params"]:
            tensor = entry[1] if isinstance(entry, tuple) else entry
            if not isinstance(tensor, Tensor):
                raise TypeError(f"the optimizer takes tensors, and one of the params is {torch.typename(tensor)}")
            by_id.setdefault(id(tensor), entry)
        unique.append({**group, "params": list(by_id.values())})
    return unique


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _try_out(
    optimizer_cls: type[torch.optim.Optimizer], device: torch.device, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    """The optimizer's defaults, and whether it updates a matrix as it would two flat slices of it."""
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
