"""What a training step keeps for its backward pass and what it recomputes, to fit a memory and lose the least time.

A block of lmsys.step.blocks keeps its input and any of the kinds of activations KINDS. Each that it does not keep is
recomputed once, in its backward pass, at a cost that does not depend on the others: so a plan is a knapsack, bytes
against seconds. Kinds are taken by seconds a byte, dearest first, from the last block to the first, as long as the peak
stays within the budget. The peak is that of a walk through the backward pass: the last block's comes first, when all
activations are there; those of the first blocks come when memory is free again, so that is where recomputing is
cheapest in memory. Greedy is at most one tensor away from the best plan.

At d_model 4096 and 32,768 tokens in bf16 on an H200, a GB of attention's output costs 49 ms to recompute; of what a
matmul gives (middle, qkv, gate, up; its FLOPs a byte of output are the width of its input) 5 to 6 ms; of a norm's 0.5.

Weights and state are those of lmsys.parallel.fsdp with compute_dtype: fp32 shards (the masters themselves), gathered in
bf16. Of 8.13e9 parameters on two GPUs they take 49 GB a GPU, where ZeRO-1 takes 65 and replicas 114. The 8.1 GB a step
that this sends more than ZeRO-1 take 27 ms, of 4 s of computation; the 16 GB that it saves are worth some 90 ms of
recomputation. Its gradients become fp32 in the shards, 16 GB, but only as the activations go.

Limits: one sequence length, no accumulation over micro-batches; the time model adds what is computed at measured rates
and overlaps communication with it perfectly but for its ends.

Legend: B sequences a GPU, T tokens, N = B T, H heads, d = d_model, f = d_ff, V vocabulary, e bytes an element.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lmsys import cost
from lmsys.config import ModelConfig, require, unknown_name

# What a block can keep beside its input: rows of d (norm1, middle, norm2), 3 d (qkv), f (gate, up); attention: its
# output, (N, d), and the log-sum-exp, (B, H, T) in fp32. silu(gate) up falls off when their gradients are made.
KINDS = ("norm1", "qkv", "attention", "middle", "norm2", "gate", "up")
PREFETCH = 1  # blocks gathered ahead: one takes 1 ms to gather and 30 to compute
CHUNK_BYTES = 3 * 2**29  # of the logits that lmsys.step.loss makes at a time, at the most
_ITEMSIZE = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Rates:
    """A second of a device: FLOP of matmuls in the step's dtype and of attention, bytes of memory traffic and links."""

    product: float
    attention_forward: float
    attention_backward: float
    memory: float
    link: float  # bus bandwidth between the GPUs


# An H200, bf16, alone: a matmul of 8,192^3, a copy of 2 GiB (artifacts/h200/ceilings_results.csv); causal attention at
# 32,768 tokens of head_dim 128 (attention_sweep_results.csv); an all-gather's bus bandwidth at 100 MiB between two.
H200 = Rates(product=782e12, attention_forward=659e12, attention_backward=523e12, memory=4.25e12, link=261e9)
H200_BYTES = 139.8 * 2**30


@dataclass
class Shape:
    """A model's step on one of `gpus` devices: batch sequences of `length` tokens, fp32 or bf16. All sizes in bytes."""

    config: ModelConfig
    batch: int
    length: int
    gpus: int
    dtype: str

    def __post_init__(self) -> None:
        config = self.config
        if self.dtype not in _ITEMSIZE:
            raise unknown_name("dtype", self.dtype, _ITEMSIZE)
        require(not config.tie_embeddings, "a plan is for untied embeddings; set model.tie_embeddings to false")
        self.itemsize = _ITEMSIZE[self.dtype]
        self.tokens = self.batch * self.length
        self.residual = self.itemsize * self.tokens * config.d_model  # (N, d), which every block's input is
        self.wide = self.itemsize * self.tokens * config.d_ff  # a feed-forward activation, (N, f)
        self.block_parameters = 4 * config.d_model**2 + 3 * config.d_model * config.d_ff  # elements, of matrices
        self.head_parameters = config.vocab_size * config.d_model  # elements, and those of the embedding
        gains = (2 * config.num_layers + 1) * config.d_model
        # fp32 shards of the matrices and the gains whole, and two moments of each
        self.state = 3 * 4.0 * ((cost.model_parameters(config) - gains) / self.gpus + gains)
        self.tables = 4 * config.context_length * config.head_dim  # of the rotation, (T, D/2) cos and sin in fp32
        self.gathered_block = self.itemsize * self.block_parameters
        self.rest = 2 * self.itemsize * self.head_parameters  # embedding and head, gathered

    def kind_bytes(self, kind: str) -> int:
        """What keeping a kind takes in one block."""
        if kind not in KINDS:
            raise unknown_name("kind of activation", kind, KINDS)
        lse = 4 * self.tokens * self.config.num_heads
        special = {"qkv": 3 * self.residual, "attention": self.residual + lse, "gate": self.wide, "up": self.wide}
        return special.get(kind, self.residual)

    def kind_flops(self, kind: str) -> tuple[float, float]:
        """(of matmuls, of attention) FLOPs to recompute a kind in one block."""
        n, d, f = self.tokens, self.config.d_model, self.config.d_ff
        products = {"qkv": 6.0 * n * d * d, "middle": 2.0 * n * d * d, "gate": 2.0 * n * d * f, "up": 2.0 * n * d * f}
        return products.get(kind, 0.0), self._attention("forward") if kind == "attention" else 0.0

    def kind_seconds(self, kind: str, rates: Rates) -> float:
        """To recompute a kind in one block."""
        products, attention = self.kind_flops(kind)
        passes = {"norm1": 2, "qkv": 4, "middle": 4, "norm2": 2}.get(kind, 0)  # over the residual, memory-bound
        return products / rates.product + attention / rates.attention_forward + passes * self.residual / rates.memory

    def _attention(self, which: str) -> float:
        heads, head_dim = self.config.num_heads, self.config.head_dim
        return cost.attention_flops(self.batch, heads, self.length, self.length, head_dim, True, which)

    def forward_peak(self, keep: frozenset[str]) -> float:
        """What a block's forward pass, stage by stage, takes beyond its input, what it keeps and its output."""
        s, w = self.residual, self.wide
        passing = {kind: self.kind_bytes(kind) * (kind not in keep) for kind in KINDS}
        stages = [  # before the output is there
            passing["norm1"] + passing["qkv"],
            passing["qkv"] + passing["attention"],
            passing["attention"] + s + passing["middle"] + passing["norm2"],  # output projection, its sum's norm
            passing["middle"] + passing["norm2"] + passing["gate"] + passing["up"],
            passing["middle"] + passing["gate"] + passing["up"] + w,
        ]
        return float(max(max(stages) - s, passing["middle"] + w))

    def backward_peak(self, keep: frozenset[str]) -> float:
        """What a block's backward pass takes beyond what it kept and the gradient of its output."""
        s, w, d, f, e = self.residual, self.wide, self.config.d_model, self.config.d_ff, self.itemsize
        redone = {kind: self.kind_bytes(kind) * (kind not in keep) for kind in KINDS}
        # and what it is recomputed from
        attention = redone["attention"] + redone["qkv"] + redone["norm1"] * ("qkv" not in keep)
        early = redone["attention"] and attention  # for the residual in the middle, and there until its own gradient
        upper = early * ("middle" not in keep) + redone["middle"] + redone["norm2"] + redone["gate"] + redone["up"]
        below = s + e * (3 * d * f + d * d)  # the middle's gradient, and those of w1, w2, w3 and the output projection
        norm1, from_norm1 = redone["norm1"], redone["norm1"] * ("qkv" not in keep)
        return float(
            max(
                upper + w + e * d * f,  # the gradient of silu(gate) up, w2's
                upper + s + 3 * e * d * f,  # the norm's gradient, those of w1 and w3
                below + attention + 4 * s + 4 * self.tokens * d,  # do; dq, dk, dv; the fp32 sum that dq is made of
                below + from_norm1 + 6 * s,  # dq, dk, dv and the same together
                below + norm1 + 3 * s + 3 * e * d * d,
                below + 3 * s + 3 * e * d * d + s,  # norm1's gradient
            )
        )

    def loss_peak(self) -> float:
        """What the loss takes beyond the last norm's input: a chunk's logits; the head's gradient, fp32 and rounded."""
        logits = min(CHUNK_BYTES, self.itemsize * self.tokens * self.config.vocab_size)
        return 2 * self.residual + 4.0 * self.head_parameters + max(logits, self.itemsize * self.head_parameters)

    def step_seconds(self, rates: Rates) -> dict[str, float]:
        """What a step takes that keeps everything, by part."""
        config, s, w = self.config, self.residual, self.wide
        layers, n = config.num_layers, self.tokens
        products = 6.0 * cost.matmul_parameters_in_products(config) * n
        memory = layers * ((13 + 14) * s + (3 + 6) * w)  # norms, rotation, additions, SwiGLU; forward and backward
        memory += 4 * self.itemsize * n * config.vocab_size + 20 * self.head_parameters  # logits; the head's gradient
        share = (layers * self.block_parameters + 2 * self.head_parameters) / self.gpus
        sharding = (2 * (4 + self.itemsize) + self.itemsize * self.gpus * 2 + self.itemsize + 4) * share
        ends = self.rest * 1.5 * cost.bus_factor("all_gather", self.gpus)
        attention = self._attention("forward") / rates.attention_forward
        attention += self._attention("backward") / rates.attention_backward
        return {
            "products": products / rates.product,
            "attention": layers * attention,
            "memory-bound": memory / rates.memory,
            "sharding's copies": sharding / rates.memory,
            "optimizer": 28 * share / rates.memory,
            "exposed communication": ends / rates.link if self.gpus > 1 else 0.0,
        }


@dataclass(frozen=True)
class Plan:
    """What each block keeps, and what is predicted of it."""

    shape: Shape
    rates: Rates
    budget: float  # bytes
    keep: tuple[frozenset[str], ...]

    @property
    def kept_bytes(self) -> float:
        """Of activations that wait for the backward pass: blocks' inputs and kinds, and the last norm's input."""
        kinds = sum(self.shape.kind_bytes(kind) for kinds in self.keep for kind in kinds)
        return float(kinds + (len(self.keep) + 1) * self.shape.residual)

    @property
    def peak_bytes(self) -> float:
        return max(bytes_ for _, bytes_ in moments(self.shape, self.keep))

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.budget

    @property
    def recomputed(self) -> list[str]:
        """The kinds that are not kept, of all blocks."""
        return [kind for kinds in self.keep for kind in KINDS if kind not in kinds]

    @property
    def recomputed_flops(self) -> float:
        return sum(sum(self.shape.kind_flops(kind)) for kind in self.recomputed)

    @property
    def recompute_seconds(self) -> float:
        return sum(self.shape.kind_seconds(kind, self.rates) for kind in self.recomputed)

    def seconds(self) -> dict[str, float]:
        """Of the step by part, recomputation included."""
        return self.shape.step_seconds(self.rates) | {"recomputation": self.recompute_seconds}

    def __str__(self) -> str:
        gib, count = 2**30, Counter(kind for kinds in self.keep for kind in kinds)
        kept = ", ".join(f"{kind} {count[kind]}" for kind in KINDS if count[kind]) or "inputs only"
        fits = "fits" if self.fits else "DOES NOT FIT"
        return (
            f"blocks of {len(self.keep)} that keep: {kept}; {self.kept_bytes / gib:.3g} GiB kept, "
            f"peak {self.peak_bytes / gib:.4g} GiB, {fits} {self.budget / gib:.4g}; "
            f"{self.recomputed_flops / 1e12:,.4g} TFLOP recomputed, "
            f"{1e3 * self.recompute_seconds:,.3g} ms of {1e3 * sum(self.seconds().values()):,.4g}"
        )


def moments(shape: Shape, keep: Sequence[frozenset[str]]) -> list[tuple[str, float]]:
    """Bytes on a device at the moments that may be the peak: each block forward, loss, each block backward, optimizer.

    Of the first step, when embedding and head are whole to its end.
    """
    layers, s, e = len(keep), shape.residual, shape.itemsize
    always = shape.state + shape.tables
    weights = shape.rest + (PREFETCH + 1) * shape.gathered_block
    peaks, activations = [], float(s)
    for index, kinds in enumerate(keep):
        activations += sum(map(shape.kind_bytes, kinds)) + s  # its output, too, which the next one keeps
        peaks.append((f"forward {index}", always + weights + activations + shape.forward_peak(kinds)))
    peaks.append(("loss", always + weights + activations + shape.loss_peak()))
    share = shape.block_parameters / shape.gpus
    flight = shape.gathered_block * (1 + 1 / shape.gpus)
    for done, index in enumerate(reversed(range(layers))):
        activations -= s if done == 0 else sum(map(shape.kind_bytes, keep[index + 1])) + s
        gradients = e * shape.head_parameters + 4 * share * max(done - 1, 0) + (flight if done else 0.0)
        there = always + weights + activations + s + gradients  # s: of the output's gradient
        peaks.append((f"backward {index}", there + shape.backward_peak(keep[index])))
    peaks.append(("optimizer", always + shape.state / 3 + 4 * share))
    return peaks


def plan(shape: Shape, budget: float, rates: Rates = H200) -> Plan:
    """The plan that recomputes least within `budget` bytes; ValueError where not even blocks' inputs alone fit."""
    layers = shape.config.num_layers
    keep: list[frozenset[str]] = [frozenset()] * layers
    least = Plan(shape, rates, budget, tuple(keep))
    require(
        least.fits,
        f"the step takes {least.peak_bytes / 2**30:,.4g} GiB a GPU where blocks keep their inputs alone, more than the "
        f"budget of {budget / 2**30:,.4g} GiB; give more memory, fewer tokens or more GPUs",
    )
    value = {kind: shape.kind_seconds(kind, rates) / shape.kind_bytes(kind) for kind in KINDS}
    for kind in sorted(KINDS, key=lambda kind: -value[kind]):
        for index in reversed(range(layers)):
            more = [*keep]
            more[index] = keep[index] | {kind}
            if Plan(shape, rates, budget, tuple(more)).fits:
                keep = more
    return Plan(shape, rates, budget, tuple(keep))


def keep_nothing(shape: Shape, budget: float, rates: Rates = H200) -> Plan:
    """Full activation checkpointing: each block's input alone."""
    return Plan(shape, rates, budget, (frozenset(),) * shape.config.num_layers)
