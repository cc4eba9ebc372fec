"""The course's 2026 leaderboard: a full training step of an 8B model on two GPUs, 2 x 32,768 tokens, bf16.

A step is that of `lmsys train` (lmsys.bench.steps); the model is Stanford CS336's, assignment 2 (2026): vocabulary
151,936, d_model 4096, d_ff 11,008, 34 layers, 32 heads. A sequence a GPU.

- lmsys: fp32 shards of matrices and optimizer state, gathered in bf16, the step preset `written`, and blocks that keep
  what a plan says (lmsys.step.blocks and planner).
- torch_native, the peer: what PyTorch itself has, peers.FullyShardedStep. Its weights, gradients and moments are bf16,
  which is less to hold and to move than ours. Both start from the same weights and tokens.

Before that, in the same processes: the engine on a small twin, whose blocks each keep something else, beside the plain
model on the whole batch in float64, with the plain model's error in the step's dtype as the measure; and the device's
rates at the step's own shapes, and its free memory, from which the plan is made. A step that runs out of memory is a
row that names its plan, and is tried once more with a plan for less.

On a CPU, two processes and a small model show that all of this works; the memory that is planned for is then half way
between what keeping inputs alone takes and what keeping everything takes.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lmsys import cost
from lmsys.bench import experiment, leaderboard, processes
from lmsys.bench.experiment import Experiment, Parameters, Point, Row
from lmsys.bench.measure import DTYPES, Repeated, quantiles, release
from lmsys.bench.peers import FullyShardedStep
from lmsys.bench.processes import Clock
from lmsys.bench.steps import Plan, measure_step, step_columns, step_config, step_method
from lmsys.config import ModelConfig, PipelineConfig, require
from lmsys.device import resolve_device
from lmsys.model import TransformerLM
from lmsys.parallel import group
from lmsys.parallel.group import Process
from lmsys.parallel.shards import all_gather
from lmsys.step import blocks, planner
from lmsys.train.engine import Engine

BOARD, OURS, PEER = "2026", "lmsys", "torch_native"
IMPLEMENTATIONS = (OURS, PEER)
GPUS = 2
WARMUP_STEPS = 2
LESS = 3.0  # a second try after running out of memory leaves so many times the margin
_KERNELS = {"bf16": "flash_attention_triton", "fp32": "flash_attention_torch"}
# The twin's blocks: from the input alone to everything.
TWIN_KEEP = ((), ("attention",), ("qkv", "attention", "norm2"), ("qkv", "middle", "gate"), blocks.KINDS)


def parameters(p: Parameters) -> Parameters:
    """The notebook's parameters for this board: on a machine with one GPU, its CPU and a small model.

    Raises:
        ValueError: a number out of range, or scale full on a machine without two GPUs.
    """
    require(math.isfinite(p.margin_gib), f"margin_gib is {p.margin_gib!r}; it must be a finite number of GiB")
    scale, device = processes.several(p.scale, p.device)
    if scale == "full":
        here = torch.cuda.device_count() if torch.cuda.is_available() and device != "cpu" else 0
        require(
            here >= GPUS,
            f"the 2026 board at scale full takes {GPUS} GPUs, and this run has {here}; scale cpu shows a small model "
            "on two processes, and --plan what would be kept on two H200s",
        )
    elif device == "auto":
        device = "cpu"
    processes.process_counts(device, [GPUS])
    names = [name for name in p.implementations or () if name in IMPLEMENTATIONS] or list(IMPLEMENTATIONS)
    return Parameters(**p.as_dict() | {"scale": scale, "device": device, "implementations": names, "path": ""})


def config_of(p: Parameters, implementation: str = OURS, *, twin: bool = False) -> PipelineConfig:
    """A point as the trainer, or the peer, takes it."""
    sizes = leaderboard.SCALES[p.scale]["step"]
    model, dtype = ModelConfig(*sizes["twin" if twin else "model"]), sizes["dtype"]
    train = {"dtype": dtype, "attention_kernel": _KERNELS[dtype], "batch_size": 1, "device": p.device, "seed": p.seed}
    if implementation == OURS:
        train |= {"ddp_wrapper": "fsdp", "step_preset": "written"}
    else:
        train |= {"ddp_wrapper": "torch_fsdp2", "compile": dtype == "bf16"}
    return step_config(model, **train)


def engine_options(keep: Any) -> dict[str, Any]:
    """Of the trainer's engine: what each block keeps, and how far ahead blocks are gathered."""
    return {"prepare": functools.partial(blocks.select, keep=keep), "prefetch": planner.PREFETCH}


def points(p: Parameters) -> list[Point]:
    """Each implementation."""
    found = []
    for name in p.implementations:
        model, train = (config := config_of(p, name)).model, config.train
        notes = ["not the board's shape"] * (p.scale != "full")
        notes += [f"weights, gradients and moments in {train.dtype}"] * (name == PEER)
        point = {"board": BOARD, "implementation": name, "path": p.path, "gpus": GPUS, "batch": GPUS}
        point |= {"heads": model.num_heads, "seq_len": model.context_length, "head_dim": model.head_dim}
        found.append(point | {"dtype": train.dtype, "compiled": bool(train.compile), "note": "; ".join(notes)})
    return found


def measure_point(point: Point, p: Parameters, process: Process) -> Row:
    """Times of steps; before ours, the twin's errors and the plan."""
    start, config = time.perf_counter(), config_of(p, point["implementation"])
    row, options = {}, {"peer": FullyShardedStep}
    if point["implementation"] == OURS:
        row |= check_twin(process, p)
        plan = make_plan(config, p.margin_gib, device_rates(process, config), free_bytes(process))
        row, options = row | plan_columns(plan), engine_options(plan.keep)
    try:
        result = measure_step(process, config, Plan(WARMUP_STEPS, p.timed_steps), **options)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"{str(error).splitlines()[0]} The plan: {row.get('plan')}") from error
    columns = step_columns(config, result, device=process.device, gpus=GPUS)
    row |= {name: columns[name] for name in ("p20_ms", "p80_ms", "samples", "mfu", "peak_mib", "tokens_per_s")}
    row |= {"median_ms": columns["step_ms"], "loss": result["losses"][0], "ready_s": result["ready_s"]}
    flops = columns["tokens_per_s"] / GPUS * cost.train_flops_per_token(config.model)
    return row | {"tflops": flops / 1e12, "elapsed_s": time.perf_counter() - start}


STEP = Experiment(
    name=leaderboard.NAME,
    columns=leaderboard.COLUMNS,
    points=points,
    measure=measure_point,
    processes=lambda point, p: GPUS,
    limit_s=400.0,  # compilation included
    method=lambda p: (
        step_method(Plan(WARMUP_STEPS, p.timed_steps), resolve_device(p.device), config_of(p).train.dtype)
        | {"error": "of the twin: the largest relative error of a parameter's gradient against float64"}
    ),
)


def run(p: Parameters, **options: Any):
    """Measure the board, ours twice where the first ran out of memory. Returns its rows. options: of experiment.run."""
    # Gathered blocks and activations of many sizes leave fewer gaps where the allocator's segments grow.
    unset = "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # of the processes
    try:
        frame = experiment.run(STEP, p, keep=leaderboard.other_boards(BOARD), **options)
        mine = leaderboard.of_board(frame, BOARD)
        if ((mine.implementation == OURS) & (mine.status == "oom")).any():
            less = {"implementations": [OURS], "margin_gib": LESS * p.margin_gib, "path": "second plan"}
            frame = experiment.run(STEP, Parameters(**p.as_dict() | less), keep=lambda row: True, **options)
    finally:
        if unset:
            del os.environ["PYTORCH_CUDA_ALLOC_CONF"]
    return leaderboard.of_board(frame, BOARD)


# --- Correctness ----------------------------------------------------------------------------------


def check_twin(process: Process, p: Parameters) -> dict[str, float]:
    """On rank 0 the largest relative error of a gradient by our engine, and by the plain model in the step's dtype."""
    config = config_of(p, twin=True)
    engine = Engine(config, process.device, **engine_options(TWIN_KEEP))
    generator = torch.Generator().manual_seed(p.seed + 1)
    size = (process.world_size, config.model.context_length + 1)
    drawn = torch.randint(config.model.vocab_size, size, generator=generator).to(process.device)
    sequences = drawn[:, :-1], drawn[:, 1:]
    mine = tuple(tensor[process.rank : process.rank + 1] for tensor in sequences)
    loss = group.mean_over_ranks(engine.accumulate(Repeated(mine))).item()
    engine.apply(config.optim.learning_rate)  # the first moment is then the gradient, times 1 - beta1
    _, state = engine.strategy.whole_state()
    if process.rank != 0:
        return {}
    exact_loss, exact = _plain(config, torch.float64, *sequences)
    plain_loss, plain = _plain(config, DTYPES[config.train.dtype], *sequences)

    def distance(gradients: dict[str, Tensor]) -> float:
        return max(((gradients[name] - one).norm() / one.norm()).item() for name, one in exact.items())

    names = sorted(exact, key=lambda name: exact[name].ndim < 2)  # matrices first, as the optimizer has them
    moments = {name: state["state"][index]["exp_avg"].double() for index, name in enumerate(names)}
    ours = {name: moment / (1 - config.optim.beta1) for name, moment in moments.items()}
    errors = {
        "loss_error": abs(loss - exact_loss) / exact_loss,
        "plain_loss_error": abs(plain_loss - exact_loss) / exact_loss,
        "gradient_error": distance(ours),
        "plain_gradient_error": distance(plain),
    }
    check_errors(errors, config.train.dtype)
    return {"error": errors["gradient_error"], "error_pytorch": errors["plain_gradient_error"]}


def check_errors(errors: dict[str, float], dtype: str) -> None:
    """ArithmeticError where ours is more than twice as far from float64 as the plain model in the step's dtype."""
    floor = {"fp32": 1e-6, "bf16": 1e-3}[dtype]  # by chance the plain model's loss above all is nearer than that
    if not all(errors[f"{what}_error"] <= 2 * errors[f"plain_{what}_error"] + floor for what in ("gradient", "loss")):
        numbers = ", ".join(f"{name} {value:.2g}" for name, value in errors.items())
        raise ArithmeticError(f"the twin is wrong: {numbers}")


def _plain(config: PipelineConfig, dtype: torch.dtype, ids: Tensor, targets: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients, in float64 on the CPU, of the plain model with its matrices in dtype, on the whole batch."""
    torch.manual_seed(config.train.seed)
    with ids.device:
        model = TransformerLM(config.model, attention_kernel="vectorized_torch")
    for parameter in model.parameters():
        if parameter.ndim >= 2 or dtype == torch.float64:
            parameter.data = parameter.data.to(dtype)
    total = 0.0
    for one, wanted in zip(ids.split(1), targets.split(1), strict=True):  # a sequence at a time, as a rank has it
        logits = model(one)[0]
        wide = torch.promote_types(logits.dtype, torch.float32)
        loss = F.cross_entropy(logits.to(wide), wanted[0]) / len(ids)
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad.double().cpu() for name, parameter in model.named_parameters()}


# --- The plan -------------------------------------------------------------------------------------


def step_shape(config: PipelineConfig) -> planner.Shape:
    """The step of one GPU, for the planner."""
    return planner.Shape(config.model, 1, config.model.context_length, GPUS, config.train.dtype)


def device_rates(process: Process, config: PipelineConfig) -> planner.Rates:
    """The device's rates at the step's shapes, means over the ranks: all plan from the same numbers."""
    device, model, step = process.device, config.model, step_shape(config)
    make = functools.partial(torch.randn, device=device, dtype=DTYPES[config.train.dtype])
    n, d, f, length = step.tokens, model.d_model, model.d_ff, model.context_length

    x, weight, wide = make(n, d), make(f, d), make(n, f)  # the feed-forward layer's first product; a copy of its output
    product = 2.0 * n * d * f / _seconds(device, lambda: x @ weight.t())
    target = torch.empty_like(wide)
    memory = 2.0 * wide.nbytes / _seconds(device, lambda: target.copy_(wide))

    kernel, qkv = config.train.attention_kernel, make(1, length, 3, model.num_heads, model.head_dim)  # as a block has
    q, k, v = (qkv[:, :, index].transpose(1, 2) for index in range(3))
    o, lse = blocks.attend(kernel, q, k, v)
    do = torch.randn_like(o)
    flops = functools.partial(cost.attention_flops, 1, model.num_heads, length, length, model.head_dim, True)
    forward = flops("forward") / _seconds(device, lambda: blocks.attend(kernel, q, k, v))
    backward = _seconds(device, lambda: blocks.attend_backward(kernel, q, k, v, o, lse, do))

    share = make(-(-step.block_parameters // process.world_size))  # a block's matrices, gathered
    whole = share.new_empty(share.numel() * process.world_size)
    bus_bytes = cost.bus_factor("all_gather", process.world_size) * whole.nbytes
    link = bus_bytes / _seconds(device, lambda: all_gather(whole, share).wait())
    rates = torch.tensor([product, forward, flops("backward") / backward, memory, link], dtype=torch.float64)
    return planner.Rates(*group.mean_over_ranks(rates.to(device)).tolist())


def free_bytes(process: Process) -> float | None:
    """The least free memory of a rank; None on a CPU."""
    if process.device.type != "cuda":
        return None
    release(process.device)
    free = torch.tensor(float(torch.cuda.mem_get_info(process.device)[0]), dtype=torch.float64, device=process.device)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    return free.item()


def _seconds(device: torch.device, function: Callable[[], Any]) -> float:
    """The median time of a call among others like it: a GPU's clocks under load are not those of one call."""
    clock = Clock(device)
    for _ in range(42 if device.type == "cuda" else 5):
        function()
        clock.tick()
    return quantiles(clock.times_ms()[1:])[0] / 1e3


def make_plan(config: PipelineConfig, margin_gib: float, rates: planner.Rates, free: float | None) -> planner.Plan:
    """The plan for free bytes less the margin; without a number, for half of what the activations could take.

    Raises:
        ValueError: it does not fit.
    """
    step = step_shape(config)
    if free is None:
        every = planner.Plan(step, rates, 0.0, (frozenset(planner.KINDS),) * config.model.num_layers)
        return planner.plan(step, (planner.keep_nothing(step, 0.0, rates).peak_bytes + every.peak_bytes) / 2, rates)
    return planner.plan(step, free - margin_gib * 2**30, rates)


def paper_plan(margin_gib: float = 4.0) -> planner.Plan:
    """The plan of the board's shape for two H200s, at rates measured on one."""
    config = config_of(Parameters(scale="full", device="cpu", seed=0))
    return planner.plan(step_shape(config), planner.H200_BYTES - margin_gib * 2**30)


def plan_columns(plan: planner.Plan) -> Row:
    """What a row says of a plan."""
    rates = plan.rates
    return {
        "plan": str(plan),
        "predicted_ms": 1e3 * sum(plan.seconds().values()),
        "predicted_peak_mib": plan.peak_bytes / 2**20,
        "rates": f"products {rates.product / 1e12:.4g} TFLOP/s, "
        f"attention {rates.attention_forward / 1e12:.4g} and {rates.attention_backward / 1e12:.4g}, "
        f"memory {rates.memory / 1e12:.3g} TB/s, link {rates.link / 1e9:.4g} GB/s",
    }


# --- Tables ---------------------------------------------------------------------------------------


def plan_kinds(plan: planner.Plan):
    """Each kind of activation: what it takes in a block, what recomputing it costs, and how many blocks keep it."""
    step, rows = plan.shape, []
    for kind in planner.KINDS:
        size, ms = step.kind_bytes(kind), 1e3 * step.kind_seconds(kind, plan.rates)
        row = {"kind": kind, "MiB a block": size / 2**20, "recomputing, ms": ms, "ms a GiB": ms / (size / 2**30)}
        kept = sum(kind in kinds for kinds in plan.keep)
        rows.append(row | {"blocks that keep it": f"{kept} of {len(plan.keep)}"})
    return pd.DataFrame(rows)


def plan_totals(plan: planner.Plan):
    """Memory at the moments that matter and time by part, of the plan and of blocks that keep their inputs alone."""
    columns = {}
    last = len(plan.keep) - 1
    for name, one in (("plan", plan), ("inputs alone", planner.keep_nothing(plan.shape, plan.budget, plan.rates))):
        at = dict(planner.moments(one.shape, one.keep))
        sizes = {"state": one.shape.state, "activations kept": one.kept_bytes, "all at the loss": at["loss"]}
        sizes |= {"all at the last block's backward": at[f"backward {last}"]}
        sizes |= {"all at the first block's backward": at["backward 0"], "peak": one.peak_bytes}
        seconds = one.seconds() | {"step": sum(one.seconds().values())}
        columns[name] = {f"{key}, GiB": value / 2**30 for key, value in sizes.items()}
        columns[name] |= {f"{key}, ms": 1e3 * value for key, value in seconds.items()}
    return pd.DataFrame(columns).rename_axis("a GPU").reset_index()
