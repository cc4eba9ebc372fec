"""What a computation costs by formula: parameters, FLOPs, bytes. No torch; each formula states its source.

Legend: B batch, H heads, T tokens of context, D head_dim, V vocabulary, L layers, d = d_model, f = d_ff.
A product of (m, k) and (k, n) matrices counts 2 m k n FLOPs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lmsys.config import ModelConfig, unknown_name


def model_parameters(config: ModelConfig) -> int:
    """Parameters of TransformerLM: L (4 d^2 + 3 d f + 2 d) + d + V d, and V d more for an untied head."""
    d, f = config.d_model, config.d_ff
    per_layer = 4 * d * d + 3 * d * f + 2 * d  # Q, K, V, O; the three SwiGLU matrices; two norm gains
    embedding = _vocab(config) * d
    return config.num_layers * per_layer + d + embedding * (1 if config.tie_embeddings else 2)


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters without the input embedding, which is a lookup; a tied head counts once, as the product it is."""
    return model_parameters(config) - (0 if config.tie_embeddings else _vocab(config) * config.d_model)


def matmul_parameters_in_products(config: ModelConfig) -> int:
    """Parameters that are matrices of a product: matmul_parameters without the norms' gains."""
    return matmul_parameters(config) - _gains(config)


def _gains(config: ModelConfig) -> int:
    return (2 * config.num_layers + 1) * config.d_model


def _vocab(config: ModelConfig) -> int:
    if config.vocab_size is None:
        raise ValueError("model.vocab_size is not set: take the tokenizer's before counting parameters")
    return config.vocab_size


def visible_pairs(q_len: int, k_len: int, causal: bool) -> float:
    """Query-key pairs that attention computes.

    Causal, top left aligned: half a square of min(q_len, k_len), and all keys for the queries past it. The diagonal is
    not counted apart, as is the convention (FlashAttention's benchmarks).
    """
    if not causal:
        return float(q_len * k_len)
    side = min(q_len, k_len)
    return side * side / 2 + (q_len - side) * k_len


def attention_flops(batch: int, heads: int, q_len: int, k_len: int, head_dim: int, causal: bool, which: str) -> float:
    """FLOPs of attention. Forward: 4 B H D pairs (QK^T and PV). Backward: 2.5 times that (five products for two).

    Source: FlashAttention-2, arXiv 2307.08691, section 4.1.
    """
    forward = 4.0 * batch * heads * head_dim * visible_pairs(q_len, k_len, causal)
    return forward * {"forward": 1.0, "backward": 2.5, "forward_backward": 3.5}[which]


def train_flops_per_token(config: ModelConfig, context_length: int | None = None) -> float:
    """FLOPs of forward and backward a token: 6 x parameters (without the input embedding) + 6 L d T. MFU counts these.

    The second term is causal attention: forward 4 T d a layer, halved by the mask; with its backward three times that.
    Source: PaLM, arXiv 2204.02311, appendix B, with attention halved.
    """
    context = config.context_length if context_length is None else context_length
    return 6.0 * matmul_parameters(config) + 6.0 * config.num_layers * config.d_model * context


def forward_flops(config: ModelConfig, batch: int, context_length: int, *, causal: bool = True) -> float:
    """FLOPs of one forward pass: the matrix products of the weights, and attention."""
    products = 2.0 * matmul_parameters_in_products(config) * batch * context_length
    shape = batch, config.num_heads, context_length, context_length, config.head_dim
    return products + config.num_layers * attention_flops(*shape, causal, "forward")


def mfu(tokens_per_s: float, flops_per_token: float, peak_flops: float | None) -> float | None:
    """Model FLOPs utilization: FLOPs a second over the device's dense peak in that dtype; None where it is unknown."""
    return None if peak_flops is None else tokens_per_s * flops_per_token / peak_flops


# --- Collectives ----------------------------------------------------------------------------------

# What each device sends (and receives) in a ring, in units of (n - 1) / n of the data's size: each rank's tensor for an
# all-reduce, the whole tensor for the others, as nccl-tests counts it (its doc/PERFORMANCE.md).
_RING_PASSES = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}
COLLECTIVES = tuple(_RING_PASSES)


def bus_factor(op: str, gpus: int) -> float:
    """Bytes that each device sends for a byte of the collective: 2 (n - 1) / n for an all-reduce, else (n - 1) / n."""
    if op not in _RING_PASSES:
        raise unknown_name("collective", op, COLLECTIVES)
    return _RING_PASSES[op] * (gpus - 1) / gpus


@dataclass(frozen=True)
class Link:
    """How long a collective takes: latency_s + bus_factor x bytes / bandwidth, in bus bytes a second and device."""

    latency_s: float
    bandwidth: float

    def seconds(self, op: str, size_bytes: float, gpus: int) -> float:
        return self.latency_s + bus_factor(op, gpus) * size_bytes / self.bandwidth

    @classmethod
    def fit(cls, op: str, gpus: int, sizes_bytes: Sequence[float], seconds: Sequence[float]) -> Link:
        """The least squares of the relative error over measured times: small messages count as much as large ones.

        Raises:
            ValueError: fewer than two sizes, or times that do not grow with the size.
        """
        import numpy as np

        if len(set(sizes_bytes)) < 2:
            raise ValueError(
                f"a latency and a bandwidth need times at two sizes or more, not {sorted(set(sizes_bytes))}"
            )
        times = np.asarray(seconds)
        terms = np.stack([1 / times, bus_factor(op, gpus) * np.asarray(sizes_bytes) / times], axis=1)
        latency, slope = np.linalg.lstsq(terms, np.ones(len(times)))[0]
        if latency < 0:  # noise at the small sizes: the line through the origin
            latency, slope = 0.0, terms[:, 1].sum() / (terms[:, 1] ** 2).sum()
        if slope <= 0:
            raise ValueError("the times do not grow with the size, so they show no bandwidth; measure larger sizes")
        return cls(float(latency), float(1 / slope))


# --- Data parallel --------------------------------------------------------------------------------


def parameter_sizes(config: ModelConfig) -> list[int]:
    """Elements of each parameter of TransformerLM in the order in which the backward pass finishes their gradients.

    The head, the last norm, the layers from the last to the first, the embedding; a tied one comes last.
    """
    d, f, head = config.d_model, config.d_ff, _vocab(config) * config.d_model
    layer = [d * f, d * f, d * f, d, d * d, 3 * d * d, d]  # w2, w1 and w3, ln2; output, qkv, ln1
    return [*([] if config.tie_embeddings else [head]), d, *layer * config.num_layers, head]


def buckets(sizes: Sequence[int], element_bytes: int, bucket_bytes: float) -> list[int]:
    """Bytes of each bucket when gradients fill them in this order: one that would pass bucket_bytes begins the next."""
    filled: list[int] = []
    for size in sizes:
        if filled and filled[-1] + size * element_bytes <= bucket_bytes:
            filled[-1] += size * element_bytes
        else:
            filled.append(size * element_bytes)
    return filled


def exposed_communication(messages: Sequence[float], link: Link, gpus: int, backward_s: float = 0.0) -> float:
    """Seconds that the all-reduces of messages (bytes each) take past the end of the backward pass.

    A message starts when its gradients are there, which is after its share by bytes of backward_s, and when the one
    before it is done. backward_s 0: nothing is hidden. Left out: what communication takes from the computation beside
    it, memory bandwidth and multiprocessors.
    """
    total, done, ready = sum(messages), 0.0, 0.0
    for message in messages:
        ready += backward_s * message / total
        done = max(done, ready) + link.seconds("all_reduce", message, gpus)
    return done - backward_s


def ddp_overhead(
    gradient_bytes: float, algorithm_bandwidth: float, call_overhead_s: float, num_buckets: float
) -> float:
    """Seconds after the backward pass where computing a bucket takes as long as sending it: s / (n w) + n o.

    The last bucket has nothing to hide behind, and each call puts communication its overhead o further behind.
    s: gradient_bytes. w: algorithm_bandwidth, a rank's bytes over the time of their all-reduce. n: num_buckets.
    """
    return gradient_bytes / (num_buckets * algorithm_bandwidth) + num_buckets * call_overhead_s


def best_bucket_bytes(gradient_bytes: float, algorithm_bandwidth: float, call_overhead_s: float) -> float:
    """The bucket size s / n at the minimum of ddp_overhead, where n = sqrt(s / (w o)): sqrt(s w o)."""
    return math.sqrt(gradient_bytes * algorithm_bandwidth * call_overhead_s)


# --- Memory of training ---------------------------------------------------------------------------

SHARDINGS = ("replicated", "zero1", "zero2", "fsdp")
MEMORY_POINTS = ("after init", "before optimizer step", "after optimizer step")


def training_state(config: ModelConfig, sharding: str, gpus: int) -> dict[str, float]:
    """Bytes on a device of fp32 parameters, gradients and Adam's two moments, after ZeRO (arXiv 1910.02054, section 3).

    zero1: the moments are divided by the number of devices; zero2: gradients, too; fsdp: matrices, too, but not the
    norms' gains. Padding, and what is gathered for the moment, are not counted.
    """
    if sharding not in SHARDINGS:
        raise unknown_name("sharding", sharding, SHARDINGS)
    parameters = model_parameters(config)
    gains = _gains(config)
    held = gains + (parameters - gains) / gpus if sharding == "fsdp" else parameters
    moments = 2 * (parameters / gpus if sharding in ("zero1", "zero2") else held)
    gradients = parameters / gpus if sharding == "zero2" else held
    return {"parameters": 4.0 * held, "gradients": 4.0 * gradients, "optimizer": 4.0 * moments}


def memory_at(config: ModelConfig, sharding: str, gpus: int) -> dict[str, float]:
    """Bytes of training_state at each of MEMORY_POINTS of the first step, whose end makes the moments."""
    state = training_state(config, sharding, gpus)
    sums = itertools.accumulate((state["parameters"], state["gradients"], state["optimizer"]))
    return dict(zip(MEMORY_POINTS, sums, strict=True))


# --- Activations ----------------------------------------------------------------------------------


def residual_stream_bytes(config: ModelConfig, batch: int, context_length: int) -> int:
    """Bytes of what flows from block to block: B T d of fp32, under autocast too, as the embedding's lookup is."""
    return 4 * batch * context_length * config.d_model


def block_residuals(
    config: ModelConfig, batch: int, context_length: int, dtype: str, *, scores: bool, fp32_softmax: bool = False
) -> dict[str, float]:
    """Bytes that one eager block of TransformerLM keeps for its backward pass, its input among them, parameters not.

    Counted from the operations of lmsys.model, each tensor once.

    Args:
        dtype: fp32 or bf16 (autocast).
        scores: attention keeps the T x T probabilities and the mask, as vectorized_torch does; else Q, K, V, output and
            log-sum-exp.
        fp32_softmax: autocast makes the probabilities in fp32 and casts them, and both are kept: on a GPU, not a CPU.
    """
    d, f, heads, length = config.d_model, config.d_ff, config.num_heads, context_length
    tokens, low = batch * length, dtype != "fp32"
    element = 2 if low else 4
    if scores:
        probabilities = batch * heads * length**2 * (element + (4 if low and fp32_softmax else 0))
        # Scaled Q, K and V in the order of batched products, and the output in that of the projection.
        attention = 4.0 * element * tokens * d + probabilities + length * length
    else:  # The product's output, which V is a view of; rotated Q and K; the output, which the projection reads too.
        attention = 6.0 * element * tokens * d + 4.0 * tokens * heads
    return {
        "input and mid-block stream": 2.0 * 4 * tokens * d,
        "norms": 2.0 * 4 * tokens * (d + 1),  # the normalized values before the gain, and 1 / rms
        # Under autocast each product casts its input: one for QKV, two of W1 and W3.
        "inputs of products": element * tokens * d * (3.0 if low else 2.0),
        "rotation": 4.0 * length * d / heads,  # cos + i sin, (T, D / 2) of complex64
        "feed-forward": 4.0 * element * tokens * f,  # W1 x, its silu, W3 x and their product
        "cast weights": 2.0 * (4 * d * d + 3 * d * f) if low else 0.0,
        "attention": attention,
    }


def head_peak(config: ModelConfig, batch: int, context_length: int, dtype: str) -> float:
    """Bytes of the last norm, the head and the loss when the backward pass has come through log-softmax.

    There are then three fp32 arrays of B T V: the log-probabilities, their gradient, and that of the logits.
    """
    tokens, d, low = batch * context_length, config.d_model, dtype != "fp32"
    norm = 4.0 * tokens * (2 * d + 1) + (2 if low else 4) * tokens * d
    return norm + 3 * 4.0 * tokens * _vocab(config) + (2.0 * _vocab(config) * d if low else 0.0)


@dataclass(frozen=True)
class Checkpointing:
    """Which blocks keep what, as TransformerLM.checkpoint_blocks(size, nested=nested) has it: its memory and time."""

    num_blocks: int
    size: int | None = None
    nested: bool = False

    def backward(self) -> list[tuple[int, int]]:
        """(inputs kept, blocks whose residuals are there) when the backward comes to each block, the last first."""
        return [
            (inputs, block - first + 1)
            for first, end, inputs in self._leaves()
            for block in reversed(range(first, end))
        ]

    def _leaves(self) -> list[tuple[int, int, int]]:
        """(first block, end, inputs kept by then) of each group that runs without checkpoints, the last first."""
        n = self.num_blocks
        if self.size is None:
            return [(0, n, 1)]
        if self.nested:
            return self._halves(0, n, 1)
        return [(at, min(at + self.size, n), at // self.size + 1) for at in reversed(range(0, n, self.size))]

    def _halves(self, first: int, last: int, inputs: int) -> list[tuple[int, int, int]]:
        if last - first <= self.size:
            return [(first, last, inputs)]
        middle = first + (last - first) // 2  # the second half's input is one more, the first's is the whole's
        return self._halves(middle, last, inputs + 1) + self._halves(first, middle, inputs)

    def forwards(self) -> int:
        """Block forwards of a step: those of the forward pass and those that the backward pass does again.

        A recomputation ends with the last tensor that it has to find: that of two halves runs the first one only.
        """
        n = self.num_blocks
        if self.size is None or (self.nested and n <= self.size):
            return n
        return n + (sum(self._again(half) for half in (n // 2, n - n // 2)) if self.nested else n)

    def _again(self, blocks: int) -> int:
        if blocks <= self.size:
            return blocks
        half = blocks // 2
        return half + self._again(half) + self._again(blocks - half)

    def peaks(
        self, stream: float, residuals: float, head: float, gradient: float, head_gradient: float
    ) -> tuple[float, float]:
        """Bytes at the most during a step: of activations alone, and of activations with the gradients made by then.

        The step's two kinds of moments: the loss, when the head's residuals are there; the backward pass of each block.

        Args:
            stream: bytes of a block's input. residuals: of a block, its input included. head: head_peak().
            gradient: of a block's parameters. head_gradient: of the head's.
        """
        first = self.backward()[0]
        at_loss = stream * first[0] + (residuals * self.num_blocks - stream if self.size is None else 0.0) + head
        activations = [stream * (inputs - 1) + residuals * blocks for inputs, blocks in self.backward()]
        gradients = [head_gradient + gradient * done for done in range(self.num_blocks)]
        whole = [a + g for a, g in zip(activations, gradients, strict=True)]
        return max(at_loss, *activations), max(at_loss, *whole)


# --- Parallel feed-forward layers -----------------------------------------------------------------
#
# The course's analysis (CS336, assignment 2: communication_accounting of 2025, section 8 of 2026), after "How to Scale
# Your Model" (Austin et al., 2025). Attention, embeddings and the element-wise function are left out; weights,
# activations and messages take 2 bytes; computation hides communication, so a layer is compute-bound where computing
# takes longer. B tokens of the whole batch, D d_model, F d_ff, W bandwidth, C FLOPs a second, n devices; N_F of them
# along the FSDP axis, N_T along the tensor-parallel one.


@dataclass(frozen=True)
class Accelerator:
    """flops: matrix products a second. bandwidth: bytes a second that a device sends."""

    flops: float
    bandwidth: float

    @property
    def intensity(self) -> float:
        """FLOPs in the time in which a byte is sent."""
        return self.flops / self.bandwidth


_PASSES = {"forward": 1, "backward": 2}  # products, and messages of weights, of a pass


@dataclass(frozen=True)
class FeedForward:
    """Layers of `matrices` products between D and F: 3 for SwiGLU, 2 for a plain layer."""

    d_model: int
    d_ff: int
    num_blocks: int = 1
    matrices: int = 3

    @property
    def parameters(self) -> int:
        return self.matrices * self.d_model * self.d_ff * self.num_blocks

    @property
    def state_bytes(self) -> float:
        """fp32 master weights, accumulated gradients and Adam's two moments."""
        return 16.0 * self.parameters

    def activation_bytes(self, tokens: float) -> float:
        """What the backward pass needs of the products: their inputs, of width D and F, 2 bytes an element."""
        return 2.0 * tokens * (self.d_model + self.d_ff) * self.num_blocks

    def device_bytes(self, tokens: float, devices: float) -> float:
        """On a device, where the state and the activations of every second layer are divided by the devices."""
        half = self.activation_bytes(tokens) / 2
        return (self.state_bytes + half) / devices + half

    def devices_for(self, tokens: float, memory_bytes: float) -> int | None:
        """The fewest devices whose memory holds device_bytes; None where the half that is not divided is too much."""
        half = self.activation_bytes(tokens) / 2
        return math.floor((self.state_bytes + half) / (memory_bytes - half)) + 1 if memory_bytes > half else None

    def compute_s(self, tokens: float, devices: float, accelerator: Accelerator, which: str = "forward") -> float:
        """Seconds of the products: 2 FLOPs a token and parameter forward, twice that backward, over the devices."""
        return _PASSES[which] * 2.0 * self.parameters * tokens / devices / accelerator.flops

    def weights_s(self, fsdp: float, tensor: float, accelerator: Accelerator, which: str = "forward") -> float:
        """Seconds along the FSDP axis. Forward: an all-gather of the weights; backward: also a gradient reduce-scatter.

        Plain data parallelism sends the same backward, as its all-reduce is those two, and nothing forward.
        """
        return _PASSES[which] * (fsdp - 1) / fsdp * 2.0 * self.parameters / tensor / accelerator.bandwidth

    def activations_s(self, tokens: float, fsdp: float, tensor: float, accelerator: Accelerator) -> float:
        """Seconds along the tensor-parallel axis of one pass: an all-reduce of (B / N_F, D) a layer."""
        size = 2.0 * tokens / fsdp * self.d_model * self.num_blocks
        return 2 * (tensor - 1) / tensor * size / accelerator.bandwidth

    # The most devices at which computing still takes as long as sending, from setting the functions above equal.

    def most_data_parallel(self, tokens: float, accelerator: Accelerator) -> float:
        """Of data parallelism (backward) and FSDP (either pass): n - 1 <= B W / C, whatever the layer."""
        return 1 + tokens / accelerator.intensity

    def most_tensor(self, accelerator: Accelerator, which: str = "forward") -> float:
        """Of tensor parallelism: n - 1 <= m F W / (2 C) forward (m matrices), twice that backward."""
        return 1 + _PASSES[which] * self.matrices * self.d_ff / (2 * accelerator.intensity)

    def most_mixed(self, tokens: float, accelerator: Accelerator, *, overlapped: bool = True) -> float:
        """Of N_F x N_T devices in the forward pass, at the best shape of the mesh.

        overlapped: the axes send at the same time, so that each has its own bound and the product is theirs. Else the
        times add: with a = m F and b = 2 B, a (N_F - 1) + b (N_T - 1) <= a B W / C, whose largest product has
        a N_F = b N_T.
        """
        if overlapped:
            return self.most_data_parallel(tokens, accelerator) * self.most_tensor(accelerator)
        a, b = self.matrices * self.d_ff, 2 * tokens
        return (a * tokens / accelerator.intensity + a + b) ** 2 / (4 * a * b)

    def tokens_per_device(self, fsdp: int, tensor: int, accelerator: Accelerator, links: int = 1) -> float | None:
        """The least tokens a device at which a mesh's forward pass is compute-bound; None where it never is.

        links: of a ring that the FSDP axis sends over at once (M_X of the Scaling Book, whose M_Y is 1 here). As there,
        (n - 1) / n counts as 1, and the axes overlap: B / N_F >= C / (W M_X), and m F / 2 >= N_T C / W.
        """
        if self.matrices * self.d_ff / 2 < tensor * accelerator.intensity:
            return None
        return accelerator.intensity / links / tensor


XXL = FeedForward(d_model=16_384, d_ff=53_248, num_blocks=126, matrices=2)  # communication_accounting
TPU_V5P = Accelerator(flops=4.6e14, bandwidth=2 * 9e10)  # as that problem gives it, from the Scaling Book
