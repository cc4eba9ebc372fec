"""One process's part of the training: the model, its wrapper and optimizer, and what they do in a step.

lmsys.train.loop drives it and every benchmark of a training step times it, so that what is published is what trains.
What differs in several processes is in lmsys.train.strategies.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lmsys.config import PipelineConfig, require
from lmsys.data import sequential_batches
from lmsys.generate import generate_text
from lmsys.model import TransformerLM, cross_entropy
from lmsys.parallel import group
from lmsys.step import graphs
from lmsys.step.optimizer import parameter_groups
from lmsys.train import checkpoint
from lmsys.train.checkpoint import damage_told
from lmsys.train.strategies import strategy

if TYPE_CHECKING:
    from lmsys.data.tokenizer import Tokenizer

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by train.dtype


class _Part(NamedTuple):
    """A forward and backward pass of a step."""

    first: bool
    communicates: bool
    share: int  # the loss is divided by this


class Engine:
    """One process's part of the training. All processes call each method at the same point of the run.

    Args:
        saved: continue from this checkpoint.
        prepare: called with the fresh model before it is wrapped, for what is no setting.
        wrapper_options: arguments of the wrapper that are no settings.
    Attributes:
        model, module, optimizer: the plain model, the wrapped one, and what updates it.
        phase: a context around each part of a step, by name: forward, backward, synchronize, optimizer (clipping too).
        capture_after: steps before the passes are captured, where train.cuda_graph is set.
        config: a benchmark may change train.dtype between steps (lmsys.config.with_train).
    """

    def __init__(
        self,
        config: PipelineConfig,
        device: torch.device,
        saved: checkpoint.Checkpoint | None = None,
        *,
        prepare: Callable[[TransformerLM], Any] | None = None,
        **wrapper_options: Any,
    ):
        settings = config.train
        self.config, self.device = config, device
        self.capture_after = graphs.WARMUP
        self.phase: Callable[[str], AbstractContextManager] = lambda name: nullcontext()
        self._passes: dict[_Part, graphs.GraphedPass] = {}
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
            residual_dtype={"bf16": torch.bfloat16, "fp32": torch.float32, None: None}[settings.residual_dtype],
        )
        if settings.written_backward:
            from lmsys.step import blocks

            blocks.select(self.model, [blocks.NO_MATMUL_RECOMPUTED] * config.model.num_layers)
        if prepare is not None:
            prepare(self.model)
        self.loss_function = cross_entropy
        if settings.compile:
            self.model.compile_blocks(mode="max-autotune-no-cudagraphs" if settings.autotune else None)
            self.loss_function = torch.compile(cross_entropy)
        self.strategy = strategy(settings)(config, self.model, wrapper_options)
        self.module, self.optimizer = self.strategy.module, self.strategy.optimizer
        self.rank, self.world_size = group.current() if self.strategy.several else (0, 1)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.dtype == "fp16")
        if saved:
            with damage_told(saved.path):
                _check_optimizer(self.optimizer, saved.optimizer, shapes)
                self.strategy.load_optimizer(saved.optimizer)
                if saved.extra.get("scaler"):
                    self.scaler.load_state_dict(saved.extra["scaler"])

    def close(self) -> None:
        """Let go of captured passes, which the process group would wait for at its end, and which hold this engine."""
        self._passes.clear()

    # --- A step ---

    def accumulate(self, batches: Any, *, micro_batches: int | None = None, communicate: bool = True) -> Tensor:
        """Forward and backward over this process's batches of a step, gradients synchronized. Returns its mean loss.

        Args:
            batches: its next() gives inputs and targets, (B, T) int64 each, as lmsys.data.BatchSampler's.
            micro_batches: in place of train.gradient_accumulation_steps.
            communicate: False leaves each process with the gradients of its own batches.
        """
        count = micro_batches or self.config.train.gradient_accumulation_steps
        step_loss = torch.zeros((), device=self.device)
        for index in range(count):
            batch = [to_device(array, self.device) for array in batches.next()]
            step_loss += self._pass_of(_Part(index == 0, communicate and index == count - 1, count))(*batch)
        self._steps += 1
        return step_loss

    def _pass_of(self, part: _Part) -> Callable[[Tensor, Tensor], Tensor]:
        """A pass over a batch, captured where the config says so and the first steps are over."""
        run = functools.partial(self._pass, part)
        if not self.config.train.cuda_graph or self._steps < self.capture_after:
            return run
        if part not in self._passes:
            self._passes[part] = graphs.GraphedPass(run, self.strategy.parameters, pool=self._pool)
        return self._passes[part]

    def _pass(self, part: _Part, inputs: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward over a batch, and the synchronization of gradients. Returns its share of the loss."""
        module, settings = self.module, self.config.train
        with self.strategy.sync() if part.communicates else self.strategy.no_sync():
            with self.phase("forward"), autocast(self.device, settings.dtype):
                fused = settings.fused_loss
                loss = module(inputs, targets) if fused else self.loss_function(module(inputs), targets)
                loss = loss / part.share
            with self.phase("backward"):
                self.scaler.scale(loss).backward()
        if part.communicates:
            with self.phase("synchronize"):
                self.strategy.finish()
        return loss.detach()

    def update(self, learning_rate: float) -> Tensor:
        """Clip the gradients and take the optimizer's step. Returns the global gradient norm before clipping."""
        norm = self.clip()
        self.apply(learning_rate)
        return norm

    def clip(self) -> Tensor:
        """Clip the gradients. Returns their global norm before that."""
        with self.phase("optimizer"):
            self.scaler.unscale_(self.optimizer)
            return self.strategy.clip(self.config.optim.max_grad_norm)

    def apply(self, learning_rate: float) -> None:
        """Take the optimizer's step with the clipped gradients."""
        with self.phase("optimizer"):
            self.strategy.step(self.scaler, learning_rate)
        self.discard()

    def discard(self) -> None:
        """Drop the gradients. Without apply(), the step leaves weights and optimizer as they were."""
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    # --- Between steps ---

    def evaluate(self, tokens: np.ndarray, max_batches: int | None = None) -> float:
        """The validation loss over max_batches, else eval_batches times a step's sequences; processes share them."""
        settings = self.config.train
        batches_a_step = settings.gradient_accumulation_steps * self.world_size
        return evaluate(
            self.model,
            tokens,
            batch_size=settings.batch_size,
            max_batches=max_batches or settings.eval_batches * batches_a_step,
            dtype=settings.dtype,
            forward=self.strategy.forward,
            fused_loss=settings.fused_loss,
            rank=self.rank,
            world_size=self.world_size,
        )

    def samples(self, tokenizer: Tokenizer) -> list[dict[str, str]]:
        """Each prompt with the text that the model writes after it, on rank 0; empty elsewhere."""
        settings, model = self.config.generate, self.strategy.whole_model()
        if model is None:
            return []
        with autocast(self.device, self.config.train.dtype):
            texts = [generate_text(model, tokenizer, prompt, settings) for prompt in settings.prompts]
        return [{"prompt": prompt, "text": text} for prompt, text in zip(settings.prompts, texts, strict=True)]


def _check_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], shapes: list[torch.Size]) -> None:
    """ValueError unless a state is of parameters of these shapes and has the optimizer's options."""
    ours, theirs = optimizer.param_groups, state["param_groups"]
    indices = [index for options in theirs for index in options["params"]]
    fits = len(ours) == len(theirs) and indices == list(range(len(shapes)))
    require(fits, f"its optimizer is of {len(indices)} parameters in {len(theirs)} groups")
    for mine, saved in zip(ours, theirs, strict=True):
        for name in ("betas", "eps", "weight_decay"):
            given = saved.get(name)
            same = json.dumps(mine[name]) == json.dumps(given)
            require(same, f"its optimizer's {name} is {given!r} and this run's {mine[name]}")
    for index, values in state["state"].items():
        require(0 <= index < len(shapes), f"its optimizer has a state of parameter {index} of {len(shapes)}")
        moments = {name for name, value in values.items() if isinstance(value, Tensor) and value.ndim}
        for name in {"exp_avg", "exp_avg_sq"} | moments:
            shape, dtype = values[name].shape, values[name].dtype
            moment = f"its optimizer's {name} of parameter {index} is {tuple(shape)} of {dtype}"
            fits = shape == shapes[index] and dtype.is_floating_point
            require(fits, f"{moment}, the parameter {tuple(shapes[index])}")
        require(float(values["step"]) >= 1, f"its optimizer's step of parameter {index} is {values['step']}")


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
    """Mean next-token loss in nats over max_batches batches of the tokens, the same ones at every call.

    Args:
        forward: what computes the logits where it is not the model itself, as a wrapper that gathers its parameters.
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


def to_device(array: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """The array on the device; the host does not wait for the copy."""
    if isinstance(array, Tensor):
        return array.to(device)
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """The context in which a model of train.dtype computes: bf16 or fp16 autocast, or nothing for fp32."""
    return torch.autocast(device.type, AUTOCAST.get(dtype, torch.bfloat16), enabled=dtype in AUTOCAST)
