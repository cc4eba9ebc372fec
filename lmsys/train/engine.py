"""One process's part of the training: the model under its wrapper, the optimizer, and what they do in a step.

lmsys.train.loop drives it; benchmarks time it. Everything here is the same in one process and in several: a wrapper or the sharded
optimizer communicates, and what is asked of an engine is whole on rank 0.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lmsys import parallel
from lmsys.config import FULLY_SHARDED, PipelineConfig, TrainConfig
from lmsys.data import BatchSampler, sequential_batches
from lmsys.generate import generate_text
from lmsys.model import TransformerLM, cross_entropy
from lmsys.parallel import group
from lmsys.step import blocks, graphs
from lmsys.step.optimizer import AdamW, FusedAdamW, clip_factor, clip_grad_norm, parameter_groups, to_low_precision
from lmsys.train import checkpoint
from lmsys.train.checkpoint import damage_told

if TYPE_CHECKING:
    from lmsys.data.tokenizer import Tokenizer

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by train.dtype


class Engine:
    """One process's part of the training: the model under its wrapper, the optimizer, and what they do in a step.

    All processes call each method at the same point of the run; what it returns is whole on rank 0.
    """

    def __init__(self, config: PipelineConfig, device: torch.device, saved: checkpoint.Checkpoint | None):
        settings = config.train
        self.config, self.device = config, device
        self.rank, self.world_size = group.current()
        self.fully_sharded = settings.ddp_wrapper in FULLY_SHARDED
        # Whether what whole_state() gives on the CPU is a copy: gathered from several processes, or from GPUs.
        self.gathers = self.fully_sharded and self.world_size > 1
        self.gathers |= settings.sharded_optimizer and device.type == "cuda"
        self._passes: dict[tuple[bool, bool], graphs.GraphedPass] = {}  # by whether it is a step's first and its last
        self._steps = 0  # that this engine has taken
        if settings.cuda_graph:
            graphs.on_own_stream(device)
            self._pool = torch.cuda.graph_pool_handle()
        torch.manual_seed(settings.seed)
        with device:  # initialized where it will be: a large model takes minutes on the CPU
            self.model = TransformerLM(config.model, attention_kernel=settings.attention_kernel)
        if saved:
            checkpoint.load_weights(self.model, saved.weights)
        shapes = [parameter.shape for options in parameter_groups(self.model, 0.0) for parameter in options["params"]]
        self.model.fuse(
            rope=settings.fused_rope,
            gate=settings.merged_gate,
            norm=settings.fused_norm,
            residual_dtype={"bf16": torch.bfloat16, "fp32": torch.float32, None: None}[settings.residual_dtype],
        )
        self.autocast_dtype = settings.dtype
        if settings.written_backward:  # which computes in the matrices' own dtype
            self.autocast_dtype = "fp32"
            blocks.select(self.model, [blocks.NO_PRODUCTS_AGAIN] * config.model.num_layers)
        self.masters = {}  # fp32 values of what becomes bf16 here, for the optimizer
        if settings.bf16_parameters:
            group.broadcast_from_rank0(self.model.parameters())  # in fp32, which the wrapper will not see
            self.masters = to_low_precision(self.model, torch.bfloat16)
        self.gradient_scale: Tensor | None = None  # of clipping, where the optimizer applies it
        self.loss_function = cross_entropy
        if settings.compile:
            self.model.compile_blocks(mode="max-autotune-no-cudagraphs" if settings.autotune else None)
            self.loss_function = torch.compile(cross_entropy)
        if settings.compile_rest:
            self.model.compile_rest()
        self.module = parallel.wrap(self.model, settings.ddp_wrapper, **_wrapper_options(settings))
        self.parameters = list(self.module.parameters())
        self.optimizer = self._make_optimizer()
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.dtype == "fp16")
        if saved:
            with damage_told(saved.path):
                self._check_optimizer(saved.optimizer, shapes)
                self._load_optimizer(saved.optimizer)
                if saved.extra.get("scaler"):
                    self.scaler.load_state_dict(saved.extra["scaler"])

    def _make_optimizer(self) -> torch.optim.Optimizer:
        optim = self.config.optim
        groups = parameter_groups(self.module, optim.weight_decay)
        options = {"lr": optim.learning_rate, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
        if self.config.train.sharded_optimizer:
            from lmsys.parallel.zero1 import ShardedOptimizer

            return ShardedOptimizer(
                groups, AdamW, reduce_scatter_gradients=self.config.train.reduce_scatter_gradients, **options
            )
        if self.config.train.fused_optimizer:
            masters, self.masters = self.masters, {}
            return FusedAdamW(groups, masters=masters, **options)
        return AdamW(groups, **options)

    def _check_optimizer(self, state: dict[str, Any], shapes: list[torch.Size]) -> None:
        """ValueError unless a state is of parameters of these shapes and has this optimizer's options."""
        ours, theirs = self.optimizer.param_groups, state["param_groups"]
        indices = [index for options in theirs for index in options["params"]]
        if len(ours) != len(theirs) or indices != list(range(len(shapes))):
            raise ValueError(f"its optimizer is of {len(indices)} parameters in {len(theirs)} groups")
        for mine, saved in zip(ours, theirs, strict=True):
            for name in ("betas", "eps", "weight_decay"):
                if json.dumps(mine[name]) != json.dumps(saved.get(name)):
                    raise ValueError(f"its optimizer's {name} is {saved.get(name)!r} and this run's {mine[name]}")
        for index, values in state["state"].items():
            if not 0 <= index < len(shapes):
                raise ValueError(f"its optimizer has a state of parameter {index} of {len(shapes)}")
            moments = {name for name, value in values.items() if isinstance(value, Tensor) and value.ndim}
            for name in {"exp_avg", "exp_avg_sq"} | moments:
                moment = values[name]
                if moment.shape != shapes[index] or not moment.is_floating_point():
                    raise ValueError(
                        f"its optimizer's {name} of parameter {index} is {tuple(moment.shape)} of {moment.dtype}, the "
                        f"parameter {tuple(shapes[index])}"
                    )
            if not float(values["step"]) >= 1:
                raise ValueError(f"its optimizer's step of parameter {index} is {values['step']}")

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        if self.fully_sharded:
            self.module.scatter_optimizer_state(self.optimizer, state)
        elif self.config.train.sharded_optimizer:
            self.optimizer.load_full_state_dict(state)
        else:
            self.optimizer.load_state_dict(state)

    def whole_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and optimizer state in the format of one process."""
        if self.fully_sharded:
            weights = checkpoint.each_once(self.module.full_state_dict())
            return weights, self.module.gather_optimizer_state(self.optimizer)
        weights = checkpoint.model_weights(self.model)
        if isinstance(self.optimizer, FusedAdamW):
            masters, named = self.optimizer.masters(), dict(self.model.named_parameters())
            weights = {name: masters.get(named.get(name), weight) for name, weight in weights.items()}
        if self.config.train.sharded_optimizer:
            return weights, self.optimizer.full_state_dict()
        return weights, self.optimizer.state_dict()

    def accumulate(self, sampler: BatchSampler) -> Tensor:
        """Forward and backward over this process's batches of a step, gradients synchronized. Returns its mean loss."""
        count = self.config.train.gradient_accumulation_steps
        step_loss = torch.zeros((), device=self.device)
        for index in range(count):
            batch = [to_device(array, self.device) for array in sampler.next()]
            step_loss += self._pass_of(index == 0, index == count - 1)(*batch)
        self._steps += 1
        return step_loss

    def _pass_of(self, is_first: bool, is_last: bool) -> Callable[[Tensor, Tensor], Tensor]:
        """A step's pass over a batch, captured where the config says so and the first steps are over."""
        run = functools.partial(self._pass, is_last=is_last)
        if not self.config.train.cuda_graph or self._steps < graphs.WARMUP:
            return run
        if (is_first, is_last) not in self._passes:
            self._passes[is_first, is_last] = graphs.GraphedPass(run, self.parameters, pool=self._pool)
        return self._passes[is_first, is_last]

    def _pass(self, inputs: Tensor, targets: Tensor, is_last: bool) -> Tensor:
        """Forward and backward over a batch; after a step's last one, gradients synchronized. Returns its share of the loss."""
        with self._communicating(is_last):
            with autocast(self.device, self.autocast_dtype):
                loss = self._loss(inputs, targets) / self.config.train.gradient_accumulation_steps
            self.scaler.scale(loss).backward()
        if is_last and self.config.train.reduce_scatter_gradients:
            self.optimizer.finish_gradient_synchronization()
        elif is_last and self.world_size > 1:
            self.module.finish_gradient_synchronization()
        return loss.detach()

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self.config.train.fused_loss:
            return self.module(inputs, targets)
        return self.loss_function(self.module(inputs), targets)

    @contextmanager
    def _communicating(self, is_last: bool) -> Iterator[None]:
        """A step's last backward pass communicates, through the wrapper or the optimizer; those before it only add up."""
        with ExitStack() as stack:
            if self.config.train.reduce_scatter_gradients:
                stack.enter_context(self.module.no_sync())
                if not is_last:
                    stack.enter_context(self.optimizer.no_sync())
            elif self.world_size > 1 and not is_last:
                stack.enter_context(self.module.no_sync())
            yield

    def close(self) -> None:
        """Let go of captured passes, which the process group would wait for at its end, and which hold this engine."""
        self._passes.clear()

    def update(self, learning_rate: float) -> Tensor:
        """Clip the gradients and take the optimizer's step. Returns the global gradient norm before clipping."""
        norm = self.clip()
        self.apply(learning_rate)
        return norm

    def clip(self) -> Tensor:
        """Clip the gradients. Returns their global norm before that."""
        max_norm = self.config.optim.max_grad_norm
        if isinstance(self.optimizer, FusedAdamW):
            measured = self._clip(0)
            self.gradient_scale = clip_factor(measured, max_norm) if max_norm > 0 else None
            return measured
        return self._clip(max_norm)

    def _clip(self, max_norm: float) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        if self.fully_sharded:
            norm = self.module.clip_grad_norm_(max_norm)
        elif self.config.train.sharded_optimizer:
            norm = self.optimizer.clip_grad_norm_(max_norm)
        elif isinstance(self.optimizer, FusedAdamW):
            norm = self.optimizer.gradient_norm()
        else:
            norm = clip_grad_norm(self.parameters, max_norm)
        return norm

    def apply(self, learning_rate: float) -> None:
        """Take the optimizer's step with the clipped gradients."""
        for options in self.optimizer.param_groups:
            options["lr"] = learning_rate
        fused = isinstance(self.optimizer, FusedAdamW)
        self.scaler.step(self.optimizer, **({"gradient_scale": self.gradient_scale} if fused else {}))
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def discard(self) -> None:
        """Drop the gradients: the step leaves weights and optimizer as they were."""
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self, pairs: list[list[float]] | None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Losses and gradient norms that a checkpoint holds as numbers, on the device."""
        if not pairs:
            return (), ()
        losses, norms = torch.tensor(pairs, dtype=torch.float32, device=self.device).unbind(1)
        return tuple(losses), tuple(norms)

    def evaluate(self, tokens: np.ndarray) -> float:
        """The validation loss over eval_batches times the sequences of a step, which the processes share."""
        settings = self.config.train
        return evaluate(
            self.model,
            tokens,
            batch_size=settings.batch_size,
            max_batches=settings.eval_batches * settings.gradient_accumulation_steps * self.world_size,
            dtype=self.autocast_dtype,
            forward=self.module if self.fully_sharded else None,
            fused_loss=settings.fused_loss,
            rank=self.rank,
            world_size=self.world_size,
        )

    def samples(self, tokenizer: Tokenizer) -> list[dict[str, str]]:
        """Each prompt with the text that the model writes after it, on rank 0; empty elsewhere."""
        settings = self.config.generate
        model = self._whole_model()
        if self.rank != 0:
            return []
        with autocast(self.device, self.autocast_dtype if model is self.model else self.config.train.dtype):
            return [
                {"prompt": prompt, "text": generate_text(model, tokenizer, prompt, settings)}
                for prompt in settings.prompts
            ]

    def _whole_model(self) -> TransformerLM | None:
        """The model, to be called on rank 0 alone. Of a sharded one, a copy there, for which its GPU must have room."""
        if not self.fully_sharded:
            return self.model
        weights = self.module.full_state_dict()
        if self.rank != 0:
            return None
        with self.device:
            copy = TransformerLM(self.config.model, attention_kernel=self.config.train.attention_kernel)
        checkpoint.load_weights(copy, checkpoint.each_once(weights))
        return copy


def _wrapper_options(settings: TrainConfig) -> dict[str, Any]:
    """The wrapper's own arguments, of those that the config sets."""
    options: dict[str, Any] = {
        name: getattr(settings, name) for name in ("bucket_size_mb", "transport") if getattr(settings, name) is not None
    }
    if settings.cuda_graph and settings.ddp_wrapper == "flashddp":
        options.setdefault("transport", "auto")  # copies are the fastest once the host does not launch each
    if settings.communication_dtype == "bf16":
        options["communication_dtype"] = torch.bfloat16
    if settings.ddp_wrapper in FULLY_SHARDED and settings.dtype == "bf16":
        options["compute_dtype"] = torch.bfloat16
    return options


@torch.no_grad()
def evaluate(
    model: TransformerLM,
    tokens: np.ndarray,
    *,
    batch_size: int,
    max_batches: int,
    dtype: str = "fp32",
    forward: nn.Module | None = None,
    fused_loss: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> float:
    """Mean next-token loss in nats over the first max_batches batches of the tokens, the same ones at every call.

    Args:
        forward: what computes the logits where it is not the model itself, as a wrapper that gathers its parameters.
        fused_loss: without the logits of all tokens.
        rank, world_size: of the processes that share the batches; all of them call this, and go forward equally often.
    """
    forward = model if forward is None else forward
    device = model.token_embeddings.weight.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # of losses, and of tokens
    batches = sequential_batches(tokens, batch_size, model.config.context_length, max_batches)
    while together := list(itertools.islice(batches, world_size)):
        inputs, targets = together[min(rank, len(together) - 1)]
        # A last batch that is smaller would be compiled anew, for any size: that takes longer than it does.
        eager = model.compiled and len(inputs) < batch_size
        with autocast(device, dtype), torch.compiler.set_stance("force_eager") if eager else nullcontext():
            ids, wanted = to_device(inputs, device), to_device(targets, device)
            loss = forward(ids, wanted) if fused_loss else cross_entropy(forward(ids), wanted)
        if rank < len(together):
            sums += torch.stack((loss.double() * targets.size, torch.full_like(sums[1], targets.size)))
    if world_size > 1:
        sums = group.mean_over_ranks(sums)
    total, count = sums.tolist()
    return total / count


# --- Small parts ----------------------------------------------------------------------------------


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device; the host does not wait for the copy."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """The context in which a model of train.dtype computes: bf16 or fp16 autocast, or nothing for fp32."""
    return torch.autocast(device.type, AUTOCAST.get(dtype, torch.bfloat16), enabled=dtype in AUTOCAST)
