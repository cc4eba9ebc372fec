"""Triton kernels of the training step beside attention: cross-entropy in place, AdamW and squares over many tensors, rotation,
SwiGLU's gate, RMSNorm's gradient.

All are bound by memory and read and write each element once or twice; their callers in lmsys.step import this
module where tensors lie on a GPU. On the CPU interpreter it is there to check, not to be fast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmsys.attention.flash_triton import INTERPRETED, tl, triton  # which sets up the interpreter where there is no GPU

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2))
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min / 2)  # times log2(e) is finite
_MAX, _SUM = (
    tl.standard._elementwise_max,
    tl.standard._sum_combine,
)  # interpreted whenever the kernel is, as tl.max may not be

_HAS_RCP = tl.constexpr(not INTERPRETED and not torch.version.hip)

_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# --- Cross-entropy --------------------------------------------------------------------------------
#
# A row's program runs over it twice, for the log-sum-exp and for the gradient. With 32 warps of at most 32 registers a thread there are
# two programs on an SM: one waits for memory while the other computes, and the rows in flight (264 of 100 KB at 50,304 logits in bf16)
# fit an H200's L2 of 60 MB, so that the second read need not go to memory. A row is whole vectors, and less than one more.

_LOSS_STAGES = 1  # of the loops over a row: two, so that a row's next vectors are under way to shared memory, made it half as slow again
_LOSS_OPTIONS = {} if torch.version.hip else {"maxnreg": 32}


@triton.jit
def _logits(base, columns, end):
    """In fp32, -inf from column `end` on."""
    return tl.load(base + columns, mask=columns < end, other=-float("inf")).to(tl.float32)


@triton.jit
def _add_exponentials(x, maximum, total):
    """Online softmax a lane: x (LANES, WIDTH), the rest (LANES,). WIDTH lies in one thread: nothing is exchanged.

    Differences come before the factor log2(e): of logits in the hundreds, rounding a product would lose what a difference keeps.
    """
    new_maximum = tl.maximum(maximum, tl.reduce(x, 1, _MAX))
    exponentials = tl.math.exp2((x - new_maximum[:, None]) * _LOG2_E)
    total = total * tl.math.exp2((maximum - new_maximum) * _LOG2_E) + tl.reduce(exponentials, 1, _SUM)
    return new_maximum, total


@triton.jit
def _store_gradient(base, x, columns, end, maximum, rest, target, target_gradient, is_ignored, holds_target):
    """Replace logits x by scale (softmax - one_hot(target)). rest: log2 of the sum of exp(x - maximum) / scale."""
    gradient = tl.math.exp2((x - maximum) * _LOG2_E - rest)
    if holds_target:
        gradient = tl.where(columns == target, target_gradient, gradient)
    if is_ignored:
        gradient = tl.full(gradient.shape, 0.0, tl.float32)
    tl.store(base + columns, gradient.to(base.dtype.element_ty), mask=columns < end)


@triton.jit
def _cross_entropy_kernel(
    logits, targets, losses, row_stride, vocabulary, ignore_index, scale,
    GRADIENT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """losses[row] = -log softmax(logits[row])[target], in fp32; where GRADIENT, logits[row] becomes its gradient times scale.

    A target that is no column gives NaN: nothing is read or written out of bounds.
    """
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    target = tl.load(targets + row)
    is_ignored = target == ignore_index
    inside = (target >= 0) & (target < vocabulary)
    target_logit = tl.load(base + target, mask=inside, other=float("nan")).to(tl.float32)

    BLOCK: tl.constexpr = LANES * WIDTH
    columns = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    whole = vocabulary // WIDTH * WIDTH
    last = whole + tl.arange(0, LANES)[:, None]  # the columns after the last whole vector
    maximum = tl.full([LANES], _LOWEST, tl.float32)
    total = tl.full([LANES], 0.0, tl.float32)
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        maximum, total = _add_exponentials(_logits(base, start + columns, whole), maximum, total)
    if whole < vocabulary:
        maximum, total = _add_exponentials(_logits(base, last, vocabulary), maximum, total)
    top = tl.reduce(maximum, 0, _MAX)
    rest = tl.math.log2(tl.reduce(total * tl.math.exp2((maximum - top) * _LOG2_E), 0, _SUM))
    loss = rest * _LN_2 + (top - target_logit)
    tl.store(losses + row, tl.where(is_ignored, 0.0, loss))
    if GRADIENT:
        target_gradient = (tl.math.exp2(loss * -_LOG2_E) - 1.0) * scale
        rest -= tl.math.log2(scale)
        for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
            x = _logits(base, start + columns, whole)
            holds = (target >= start) & (target < start + BLOCK)
            _store_gradient(base, x, start + columns, whole, top, rest, target, target_gradient, is_ignored, holds)
        if whole < vocabulary:
            x = _logits(base, last, vocabulary)
            _store_gradient(base, x, last, vocabulary, top, rest, target, target_gradient, is_ignored, target >= whole)


def cross_entropy_(
    logits: Tensor, targets: Tensor, losses: Tensor, ignore_index: int, scale: float, gradient: bool
) -> None:
    """Write the loss of each row, and, where asked, over the logits their gradient times scale.

    logits: (N, V), rows of any stride; targets: (N,) int64; losses: (N,) fp32; the last two contiguous.
    """
    rows, vocabulary = logits.shape
    width = 16 // logits.element_size()  # a vector load a thread
    lanes = min(1024, max(32, triton.next_power_of_2(-(-vocabulary // width))))
    with torch.cuda.device_of(logits):
        _cross_entropy_kernel[(rows,)](
            logits, targets, losses, logits.stride(0), vocabulary, ignore_index, scale,
            GRADIENT=gradient, LANES=lanes, WIDTH=width, STAGES=_LOSS_STAGES, num_warps=lanes // 32, **_LOSS_OPTIONS,
        )  # fmt: skip


# --- AdamW ----------------------------------------------------------------------------------------


_ADAMW_WARPS = 8


@triton.jit
def _gradient_block(gradients, lengths, firsts, slots, block, exists, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Of a block of the flat arrays, where it exists: its tensor, its first element there, that one's address in the gradient, and the
    number of elements from there on, 0 or less without a gradient."""
    slot = tl.load(slots + block, mask=exists, other=0)
    address = tl.load(gradients + slot)
    inner = (block - tl.load(firsts + slot)).to(tl.int64) * BLOCK
    remaining = tl.where(exists & (address != 0), tl.load(lengths + slot) - inner, 0)
    gradient = address.to(tl.pointer_type(DTYPE)) + inner
    if ALIGNED:
        gradient = tl.multiple_of(gradient, 16)
        remaining = tl.multiple_of(remaining, 8)
    return slot, inner, gradient, remaining


@triton.jit
def _adamw_kernel(
    gradients, parameters, lengths, firsts, slots, masters, exp_avgs, exp_avg_sqs, gradient_scale,
    decay, lerp1, beta2, lerp2, step_size, correction, eps,
    DTYPE: tl.constexpr, MASTER: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A step of AdamW on one block of one tensor.

    gradients, parameters: (tensors,) addresses, a gradient's 0 where there is none; lengths: (tensors,) elements; firsts: (tensors,)
    the first program of each; slots: (programs,) the tensor of each. masters, exp_avgs, exp_avg_sqs: flat fp32, BLOCK elements a program.

    Nothing branches: the flat arrays are under way while the tables are read, one after the other.
    """
    program = tl.program_id(0)
    local = tl.arange(0, BLOCK)
    flat = program.to(tl.int64) * BLOCK + local
    m = tl.load(exp_avgs + flat)
    v = tl.load(exp_avg_sqs + flat)
    if MASTER:
        theta = tl.load(masters + flat)
    slot, inner, gradient, remaining = _gradient_block(
        gradients, lengths, firsts, slots, program, True, DTYPE, ALIGNED, BLOCK
    )
    parameter = tl.load(parameters + slot).to(tl.pointer_type(DTYPE)) + inner
    if ALIGNED:
        parameter = tl.multiple_of(parameter, 16)
    mask = local < remaining
    g = tl.load(gradient + local, mask=mask, other=0.0).to(tl.float32)
    if not MASTER:
        theta = tl.load(parameter + local, mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        g *= tl.load(gradient_scale)
    m += lerp1 * (g - m)
    v = beta2 * v + lerp2 * g * g
    theta = decay * theta - step_size * (m / (tl.sqrt(v) / correction + eps))
    tl.store(exp_avgs + flat, m, mask=mask)
    tl.store(exp_avg_sqs + flat, v, mask=mask)
    if MASTER:
        tl.store(masters + flat, theta, mask=mask)
    tl.store(parameter + local, theta.to(DTYPE), mask=mask)


def adamw_(
    tables: tuple[Tensor, ...],
    masters: Tensor | None,
    exp_avgs: Tensor,
    exp_avg_sqs: Tensor,
    gradient_scale: Tensor | None,
    scalars: tuple[float, ...],
    *,
    dtype: torch.dtype,
    aligned: bool,
    block: int,
) -> None:
    """One step of the tensors of the tables, of one dtype with their gradients; see the kernel.

    scalars: 1 - lr weight_decay, 1 - beta1, beta2, 1 - beta2, lr over the first moment's bias correction, the root of the second's, eps.
    aligned: all addresses are multiples of 16 bytes, and all lengths of 8 elements: accesses are vectors.
    """
    nothing = exp_avgs
    with torch.cuda.device_of(exp_avgs):
        _adamw_kernel[(tables[-1].numel(),)](
            *tables, nothing if masters is None else masters, exp_avgs, exp_avg_sqs,
            nothing if gradient_scale is None else gradient_scale, *scalars,
            DTYPE=_TRITON_DTYPES[dtype], MASTER=masters is not None, SCALED=gradient_scale is not None,
            ALIGNED=aligned, BLOCK=block, num_warps=_ADAMW_WARPS,
        )  # fmt: skip


_SQUARES_BLOCKS = 4  # of a program: their addresses are looked up, and their elements under way, together
_SQUARES_WARPS = 8


@triton.jit
def _squares_kernel(
    gradients, lengths, firsts, slots, sums, count,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """sums[program]: of the squares of BLOCKS of the `count` blocks of the tables that _adamw_kernel has."""
    local = tl.arange(0, BLOCK)
    total = tl.full([BLOCK], 0.0, tl.float32)
    for index in tl.static_range(BLOCKS):
        block = tl.program_id(0) * BLOCKS + index
        _, _, gradient, remaining = _gradient_block(
            gradients, lengths, firsts, slots, block, block < count, DTYPE, ALIGNED, BLOCK
        )
        g = tl.load(gradient + local, mask=local < remaining, other=0.0).to(tl.float32)
        total += g * g
    tl.store(sums + tl.program_id(0), tl.reduce(total, 0, _SUM))


def squares(
    gradients: Tensor, places: tuple[Tensor, Tensor, Tensor], *, dtype: torch.dtype, aligned: bool, block: int
) -> Tensor:
    """Sums in fp32 of the squares of the gradients, a part of them each.

    gradients, places (lengths, firsts and slots): the tables of _adamw_kernel; aligned as in adamw_.
    """
    count = places[-1].numel()
    sums = torch.empty(-(-count // _SQUARES_BLOCKS), dtype=torch.float32, device=gradients.device)
    with torch.cuda.device_of(gradients):
        _squares_kernel[(sums.numel(),)](
            gradients, *places, sums, count,
            DTYPE=_TRITON_DTYPES[dtype], ALIGNED=aligned, BLOCK=block, BLOCKS=_SQUARES_BLOCKS, num_warps=_SQUARES_WARPS,
        )  # fmt: skip
    return sums


# --- Rotary embedding -----------------------------------------------------------------------------


_ROTATE_ROWS, _ROTATE_HEADS, _ROTATE_WARPS = 16, 4, 4  # tokens and, at most, heads of a program


@triton.jit
def _rotated(x, cos, sin, ROWS: tl.constexpr, D_PAD: tl.constexpr):
    """The (ROWS, D_PAD) tile x, each pair of neighbours rotated by the angle of cos and sin (ROWS, D_PAD / 2)."""
    a, b = tl.split(tl.reshape(x.to(tl.float32), (ROWS, D_PAD // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (ROWS, D_PAD))


@triton.jit
def _rotate_kernel(
    q, k, v, q_out, k_out, v_out, cos, sin, T,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    out_qb, out_qh, out_qt, out_kb, out_kh, out_kt, out_vb, out_vh, out_vt,
    sign, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, COPY_V: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of HEADS heads: q and k rotated, by the angles or, with sign -1, back; v copied where COPY_V.

    The angles are read once for all heads, and a token's heads, together in the product of Q, K and V, are accessed at about one time.
    """
    batch = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)  # from the last, as the gate's
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns, half = tl.arange(0, D_PAD), tl.arange(0, D_PAD // 2)
    mask = (rows < T)[:, None] & (columns < D)[None, :]
    angles = rows[:, None] * (D // 2) + half[None, :]
    angle_mask = (rows < T)[:, None] & (half < D // 2)[None, :]
    c = tl.load(cos + angles, mask=angle_mask, other=0.0)
    s = tl.load(sin + angles, mask=angle_mask, other=0.0) * sign
    rows = rows.to(tl.int64)[:, None]
    columns = columns[None, :]
    for index in tl.static_range(HEADS):
        head = (tl.program_id(0) * HEADS + index).to(tl.int64)
        x = tl.load(q + batch * stride_qb + head * stride_qh + rows * stride_qt + columns, mask=mask)
        y = tl.load(k + batch * stride_kb + head * stride_kh + rows * stride_kt + columns, mask=mask)
        if COPY_V:
            z = tl.load(v + batch * stride_vb + head * stride_vh + rows * stride_vt + columns, mask=mask)
        x = _rotated(x, c, s, ROWS, D_PAD).to(q_out.dtype.element_ty)
        tl.store(q_out + batch * out_qb + head * out_qh + rows * out_qt + columns, x, mask=mask)
        y = _rotated(y, c, s, ROWS, D_PAD).to(k_out.dtype.element_ty)
        tl.store(k_out + batch * out_kb + head * out_kh + rows * out_kt + columns, y, mask=mask)
        if COPY_V:
            tl.store(v_out + batch * out_vb + head * out_vh + rows * out_vt + columns, z, mask=mask)


def rotate_(
    sources: tuple[Tensor, Tensor, Tensor | None],
    targets: tuple[Tensor, Tensor, Tensor | None],
    cos: Tensor,
    sin: Tensor,
    sign: float,
) -> None:
    """Write q and k rotated, and v, where there is one, as it is, to the targets.

    All (B, H, T, D) with a stride of 1 in the last dimension, and any others; cos, sin: (T, D/2) fp32, contiguous.
    """
    batch, heads, length, head_dim = sources[0].shape
    copied = sources[2] is not None
    sources, targets = (tuple(some[0] if one is None else one for one in some) for some in (sources, targets))
    each = math.gcd(heads, _ROTATE_HEADS)
    with torch.cuda.device_of(cos):
        _rotate_kernel[(heads // each, -(-length // _ROTATE_ROWS), batch)](
            *sources, *targets, cos, sin, length,
            *[stride for tensor in (*sources, *targets) for stride in tensor.stride()[:3]],
            sign, D=head_dim, D_PAD=max(16, triton.next_power_of_2(head_dim)), ROWS=_ROTATE_ROWS, HEADS=each, COPY_V=copied,
            num_warps=_ROTATE_WARPS,
        )  # fmt: skip


# --- SwiGLU's gate --------------------------------------------------------------------------------
#
# A program has a tile of ROWS x COLUMNS elements of silu(gate) * up, and programs follow each other as memory does, but from its end:
# what the kernel before wrote last is still in the cache, and what the one after reads first will be. COLUMNS divides F wherever F is a multiple of 64, so that only a number of rows that does not fit leaves masks. F is a constant: Triton then knows the
# alignment of each half of a row.

_GATE_TILE = 2048  # elements: a vector of 16-bit ones for each of 256 threads
_GATE_WARPS = 8


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), to the last digits of fp32: the reciprocal is the GPU's own, off by one in the last, not a full division."""
    denominator = 1.0 + tl.math.exp2(x * -_LOG2_E)
    if _HAS_RCP:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [denominator], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / denominator


@triton.jit
def _gate_tile(N, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows (ROWS, 1) and columns (1, COLUMNS) of a program's tile, and which of its elements there are."""
    across: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    rows = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = (program % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return rows, columns, (rows < N) & (columns < F)


@triton.jit
def _gate_kernel(
    merged, product, N, F: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """product (N, F) = silu(gate) * up of merged (N, 2 F), whose rows are gate and up."""
    rows, columns, inside = _gate_tile(N, F, ROWS, COLUMNS)
    mask = inside if MASKED else None
    at = rows * (2 * F) + columns
    gate = tl.load(merged + at, mask=mask).to(tl.float32)
    up = tl.load(merged + at + F, mask=mask).to(tl.float32)
    h = gate * sigmoid(gate) * up
    tl.store(product + rows * F + columns, h.to(product.dtype.element_ty), mask=mask)


@triton.jit
def _gate_back_kernel(
    merged, dproduct, dmerged, product, N,
    F: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dmerged (N, 2 F) from dproduct (N, F), and product once more."""
    rows, columns, inside = _gate_tile(N, F, ROWS, COLUMNS)
    mask = inside if MASKED else None
    at, at_product = rows * (2 * F) + columns, rows * F + columns
    gate = tl.load(merged + at, mask=mask).to(tl.float32)
    up = tl.load(merged + at + F, mask=mask).to(tl.float32)
    dh = tl.load(dproduct + at_product, mask=mask).to(tl.float32)
    slope = sigmoid(gate)
    silu = gate * slope
    dgate = dh * up * slope * (1.0 + gate - silu)
    tl.store(dmerged + at, dgate.to(dmerged.dtype.element_ty), mask=mask)
    tl.store(dmerged + at + F, (dh * silu).to(dmerged.dtype.element_ty), mask=mask)
    tl.store(product + at_product, (silu * up).to(product.dtype.element_ty), mask=mask)


def gate_(merged: Tensor, product: Tensor) -> None:
    """Write silu(gate) * up. merged: (..., 2 F), product: (..., F), both contiguous."""
    grid, rows, constants = _gate_grid(product)
    with torch.cuda.device_of(product):
        _gate_kernel[grid](merged, product, rows, **constants)


def gate_back_(merged: Tensor, dproduct: Tensor, dmerged: Tensor, product: Tensor) -> None:
    """Write the gradient of merged, from that of the product, and the product. All contiguous, merged and dmerged of twice the columns."""
    grid, rows, constants = _gate_grid(product)
    with torch.cuda.device_of(product):
        _gate_back_kernel[grid](merged, dproduct, dmerged, product, rows, **constants)


def _gate_grid(product: Tensor) -> tuple[tuple[int], int, dict[str, int]]:
    """The grid, the rows, and the constants of both kernels."""
    width = product.shape[-1]
    rows = product.numel() // width
    columns = min(_GATE_TILE, max(64, width & -width))  # the power of two that divides the width
    down = _GATE_TILE // columns
    masked = width % columns != 0 or rows % down != 0
    constants = {"F": width, "MASKED": masked, "ROWS": down, "COLUMNS": columns, "num_warps": _GATE_WARPS}
    return (-(-rows // down) * -(-width // columns),), rows, constants


# --- RMSNorm's gradient ---------------------------------------------------------------------------
#
# As many programs a multiprocessor as run at once, each of which takes tiles of rows from all over the tensor and adds the gain's
# gradient up in registers: a row is read once for both gradients. The next tile is under way to shared memory while one is computed.

_NORM_TILE = (
    1024  # elements, or a row: a vector of 16-bit ones for each of 128 threads, and few that wait for each other's sums
)
_NORM_STAGES = 2
NORM_OPTIONS = (
    {} if torch.version.hip else {"maxnreg": 64}
)  # 1,024 threads at once; to d 4,096 nothing spills, above one program has all


@triton.jit
def _norm_back_kernel(
    dy, x, rstd, gain, beside, dx, partials, N, eps,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, RSTD: tl.constexpr, BESIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of y = x rstd gain: dx (N, D), plus beside where BESIDE, and partials[program] (D,), the gain's over the program's rows.

    Without RSTD, rstd is made of x again. dx may be dy: a tile is read before it is written, and by one program.
    """
    columns = tl.arange(0, D_PAD)[None, :]
    exists = columns < D
    g = tl.load(gain + columns, mask=exists, other=0.0).to(tl.float32)
    dgain = tl.full([ROWS, D_PAD], 0.0, tl.float32)
    tiles = (N + ROWS - 1) // ROWS
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        rows = ((tiles - 1 - tile) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)  # from the last, as the gate's
        at, mask = rows * D + columns, (rows < N) & exists
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        if BESIDE:  # under way with the others, not after the sums
            aside = tl.load(beside + at, mask=mask, other=0.0)
        if RSTD:
            scale = tl.load(rstd + rows, mask=rows < N, other=0.0)
        else:
            scale = 1.0 / tl.sqrt(tl.reduce(v * v, 1, _SUM)[:, None] / D + eps)
        v = v * scale
        dgain += grad * v
        grad = grad * g
        out = (grad - v * (tl.reduce(grad * v, 1, _SUM)[:, None] / D)) * scale
        if BESIDE:
            out += aside.to(tl.float32)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=mask)
    total = tl.reduce(dgain, 0, _SUM)
    local = tl.arange(0, D_PAD)
    tl.store(partials + tl.program_id(0) * D + local, total, mask=local < D)


_SUM_COLUMNS = 16  # of a program: two sectors of 32 bytes
_SUM_ROWS = 1024  # that are under way at once
_SUM_WARPS = 16


@triton.jit
def _column_sums_kernel(matrix, sums, N, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """sums (D,) of the columns of matrix (N, D), fp32."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for start in range(0, N, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        total += tl.load(matrix + rows * D + columns[None, :], mask=(rows < N) & (columns < D)[None, :], other=0.0)
    tl.store(sums + columns, tl.reduce(total, 0, _SUM), mask=columns < D)


def _column_sums(matrix: Tensor) -> Tensor:
    """torch's sum over the rows of a contiguous fp32 matrix takes several times as long: it has few programs, each of which walks far."""
    count, d = matrix.shape
    sums = matrix.new_empty(d)
    _column_sums_kernel[(-(-d // _SUM_COLUMNS),)](
        matrix, sums, count, D=d, ROWS=_SUM_ROWS, COLUMNS=_SUM_COLUMNS, num_warps=_SUM_WARPS
    )
    return sums


def norm_back_(
    dy: Tensor, x: Tensor, rstd: Tensor | None, gain: Tensor, beside: Tensor | None, dx: Tensor, eps: float = 0.0
) -> Tensor:
    """Write the gradient of x, plus beside; returns that of gain, (d,) in fp32.

    dy, x, beside, dx: (N, d), dx another than x and beside; rstd: (N,) fp32, None: made again, with eps; gain: (d,); all contiguous. The
    sums' order is a matter of the GPU alone.
    """
    count, d = x.shape
    padded = max(16, triton.next_power_of_2(d))
    rows, warps = max(1, _NORM_TILE // padded), min(16, max(_NORM_TILE, padded) // 256)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    at_once, options = (32 // warps, NORM_OPTIONS) if padded <= 4096 else (1, {})
    programs = max(1, min(-(-count // rows), processors * at_once))
    partials = torch.empty(programs, d, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _norm_back_kernel[(programs,)](
            dy, x, x if rstd is None else rstd, gain, x if beside is None else beside, dx, partials, count, eps,
            D=d, D_PAD=padded, ROWS=rows, RSTD=rstd is not None, BESIDE=beside is not None, STAGES=_NORM_STAGES, num_warps=warps, **options,
        )  # fmt: skip
        return _column_sums(partials)
