"""The sentences of the pages that rank or judge, checked against the committed rows, spread included.

A page marks such a sentence with `<!-- claim: NAME -->`; the function NAME here says what the rows must show. When a
new measurement breaks one, the sentence has to be rewritten.
"""

import functools
import re

import pandas as pd
import pytest

from lmsys import cost
from lmsys.config import ModelConfig, model_size
from lmsys.device import PEAK_TFLOPS
from lmsys.records import REPOSITORY, within_spread

PAGES = [
    *(REPOSITORY / "book").glob("*.md"),
    *(REPOSITORY / "book" / "chapters").glob("*.md"),
    REPOSITORY / "README.md",
]
CHECKS = {}


def claim(check):
    CHECKS[check.__name__] = check
    return check


@functools.cache
def rows(name):
    return pd.read_csv(REPOSITORY / "artifacts" / f"{name}.csv")


def one(frame):
    (index,) = frame.index
    return frame.loc[index]


def ahead(fast, slow):
    """Whether one row is faster than another beyond their spread."""
    time = "step_ms" if "step_ms" in fast else "median_ms"
    return slow[time] > fast[time] and not within_spread(slow[time] - fast[time], fast, slow)


def alike(frame):
    """Whether no two rows differ beyond their spread."""
    listed = [row for _, row in frame.iterrows()]
    return not any(ahead(a, b) for a in listed for b in listed)


def fastest(frame, mask):
    """Whether the one row of the mask is ahead of all others."""
    return all(ahead(one(frame[mask]), row) for _, row in frame[~mask].iterrows())


def longest(which):
    sweep = rows("h200/attention_sweep_results").query("tier == 'XXL' and causal and `pass` == @which")
    return {name: one(sweep[(sweep.kernel == name) & (sweep.path != "portable")]) for name in sweep.kernel.unique()}


@claim
def attention_longest():
    forward, backward = longest("forward"), longest("backward")
    ours, theirs = forward.pop("flash_attention_triton"), backward.pop("flash_attention_4")
    assert all(ahead(ours, row) for row in forward.values())
    assert all(ahead(theirs, row) for row in backward.values())


def steps(size):
    frame = rows("h200/train_step_results").query("size == @size")
    return {row.option if row.implementation == "lmsys" else "PyTorch": row for _, row in frame.iterrows()}


@claim
def step_faster():
    for size in ("gpt2", "gpt2-medium"):
        step = steps(size)
        for option in ("all", "written_backward"):
            assert ahead(step[option], step["PyTorch"]) and step[option].peak_mib < step["PyTorch"].peak_mib
        assert not ahead(step["written_backward"], step["all"]) and not ahead(step["all"], step["written_backward"])


def race(arm):
    return rows("h200-x2/race_results").query("arm == @arm and valid_loss == valid_loss").set_index("step")


@claim
def race_faster():
    target = race("naive").valid_loss.iloc[-1]
    for arm, step in (("ours", 450), ("ours_ddp", 400)):
        assert race(arm).valid_loss[step] < target and race(arm).seconds[step] < race("naive").seconds.iloc[-1] / 3


@claim
def race_same_loss():
    for a, b in (("naive", "ours"), ("naive", "ours_ddp"), ("ours", "ours_ddp")):
        assert (race(a).valid_loss - race(b).valid_loss).abs().max() < 0.01


def matrix(size):
    return rows("h200-x2/lm_matrix_results").query("kernel == 'flash_attention_triton' and size == @size and gpus == 2")


UNSHARDED = ["naive", "flat", "overlap", "flashddp", "torch_ddp"]


@claim
def scaling_within_noise():
    assert alike(matrix("gpt2").query("wrapper in @UNSHARDED"))
    medium = matrix("gpt2-medium").query("wrapper in @UNSHARDED")
    assert alike(medium[medium.wrapper != "naive"]) and not alike(medium)


@claim
def fsdp_medium():
    frame = matrix("gpt2-medium")
    assert fastest(frame, frame.wrapper == "fsdp")


@claim
def captured_copy_engines():
    frame = rows("h200-x2/data_parallel_results").query(
        "study == 'captured' and gpus == 2 and wrapper in ('flashddp', 'torch_ddp')"
    )
    xl = frame[frame["size"] == "xl"]
    assert len(xl) == 3 and fastest(xl, xl.options.str.contains("copy_engine"))
    assert all(alike(frame[frame["size"] == size]) for size in ("gpt2", "gpt2-medium"))


@claim
def board_2026_faster():
    board = rows("h200-x2/leaderboard_results").query("board == 2026")
    assert fastest(board, board.implementation == "lmsys")


@claim
def tokenizer_faster():
    frame = rows("h200/tokenizer_benchmark_results")
    for task in ("train", "encode"):
        speeds = frame[(frame.task == task) & (frame.text_mb < 60)].set_index("implementation")
        others = speeds.drop("lmsys")
        assert (others.p20_s > speeds.p80_s["lmsys"]).all()
        assert task == "train" or others.filter(like="tiktoken", axis=0).seconds.idxmin() == "tiktoken encode"


@claim
def course_formula():
    course = rows("h200/pytorch_attention_results").dropna(subset=["before_backward_mib"])
    assert (course.before_backward_mib - course.computed_mib).abs().max() < 0.01


def paired(name, index, column, time="median_ms"):
    """The rows of a file as one row a point, with the times of each value of a column."""
    return rows(name).pivot(index=index, columns=column, values=time)


@claim
def course_compiled_long():
    times = paired("h200/pytorch_attention_results", ["pass", "head_dim", "seq_len"], "implementation")
    ratio = times.naive / times.compiled
    for which in ("forward", "backward", "forward_backward"):
        assert ratio[which].idxmin() == (32, 256) and ratio[which].idxmax() == (16, 8192)


def compiled_gain():
    keys = ["size", "context_length", "dtype", "mode"]
    times = paired("h200/model_benchmark_results", keys, "compiled", "mean_ms")
    return (times.no / times.blocks).dropna()


@claim
def model_compiled():
    gain = compiled_gain()
    least, most = gain.groupby("mode").idxmin(), gain.groupby("mode").idxmax()
    assert (gain > 1).all() and all(at[0] in ("xl", "2.7b") and at[2] == "tf32" for at in least)
    assert all(at[0] in ("small", "large") and at[2] == "bf16" for at in most)


@claim
def accuracy():
    checks = rows("h200/attention_accuracy_results")
    assert (checks.status == "ok").all() and checks.deterministic.all()
    assert all((checks[f"{name}_ratio"].dropna() <= 2).all() for name in ("o", "lse", "dq", "dk", "dv"))


@claim
def steps_that_do_not_pay():
    for head_dim in (64, 128):
        step = rows("h200/flash_steps_results").query("`pass` == 'forward'")
        step = step[step.head_dim == head_dim].set_index("step")
        assert ahead(step.loc["compiled"], step.loc["tiled PyTorch"])
        assert ahead(step.loc["portable Triton"], step.loc["TMA"]) and step.median_ms.idxmin() == "overlap"


@claim
def last_step_bound():
    counters = rows("h200/counters_results").query("step == 'overlap'").set_index("head_dim")
    parts = counters[["tensor_pct", "exp_pct", "shared_pct", "issue_pct"]].astype(float).idxmax(axis=1)
    assert parts[64] == "exp_pct" and parts[128] == "tensor_pct"
    assert counters.exp_pct[64] - counters.tensor_pct[64] < 5


def against(peer, which, ours="flash_attention_triton"):
    """The rows of ours and of a peer at each point of the sweep's grid."""
    sweep = rows("h200/attention_sweep_results")
    sweep = sweep[(sweep["pass"] == which) & (sweep.path != "portable")]
    keys = ["batch", "heads", "kv_heads", "q_len", "k_len", "head_dim", "causal", "tier"]
    sweep = sweep[sweep.tier.isin(("throughput", "grouped_query", "few_blocks"))]
    return sweep[sweep.kernel == ours].merge(sweep[sweep.kernel == peer], on=keys, suffixes=("", "_peer"))


def geometric_mean(ratio):
    return ratio.prod() ** (1 / len(ratio))


@claim
def standings():
    for which in ("forward", "backward"):
        flex = against("torch_flex", which)
        assert (flex.p80_ms < flex.p20_ms_peer).all()
        few = flex[flex.tier == "few_blocks"]
        assert (flex.median_ms_peer / flex.median_ms).idxmax() in few.index
        cudnn = against("torch_sdpa_cudnn", which).query("tier != 'few_blocks' and q_len >= 1024")
        assert geometric_mean(cudnn.median_ms_peer / cudnn.median_ms) > 1
    forward, backward = (
        against("flash_attention_4", which).query("tier != 'few_blocks'") for which in ("forward", "backward")
    )
    assert geometric_mean(forward.median_ms_peer / forward.median_ms) > 1
    assert (backward.median_ms_peer < backward.median_ms).all()


@claim
def flash_extremes():
    times = paired("h200/flash_benchmarking_results", ["pass", "dtype", "head_dim", "seq_len"], "implementation")
    for ratio in (times.naive / times.flash, times.compiled / times.flash):
        for which in ("forward", "backward", "forward_backward"):
            assert ratio[which].idxmin() == ("fp32", 128, 1024) and ratio[which].idxmax() == ("bf16", 16, 65536)
    both = (times.naive / times.flash)["forward_backward"]
    slower = both[both < 1]
    assert slower.index.get_level_values("seq_len").max() == 8192 and set(slower.index.get_level_values("dtype")) == {
        "fp32"
    }
    assert (rows("h200/flash_benchmarking_results").status == "ok").all()


@claim
def tiled_slower():
    sweep = rows("h200/attention_sweep_results").query(
        "causal and `pass` == 'forward' and batch == 4 and q_len == k_len"
    )
    sweep = sweep[sweep.heads == 12].set_index(["kernel", "q_len"])
    tiled, naive = sweep.loc["flash_attention_torch"], sweep.loc["scaled_dot_prod_attention"]
    assert all(ahead(naive.loc[length], tiled.loc[length]) for length in naive.index)
    assert ((tiled.peak_mib < naive.peak_mib) == (naive.index >= 2048)).all()


def no_gain(option):
    """Whether a step without an option is as fast as with it, both without the backward pass written by hand."""
    step = steps("gpt2")
    return not ahead(step["written_backward"], step[option]) and not ahead(step[option], step["written_backward"])


@claim
def compile_rest_no_gain():
    assert no_gain("compile_rest")


@claim
def fused_norm_no_gain():
    assert no_gain("fused_norm") and steps("gpt2")["fused_norm"].peak_mib == steps("gpt2")["written_backward"].peak_mib


@claim
def bf16_parameters_no_gain():
    step = steps("gpt2")
    assert no_gain("bf16_parameters") and step["bf16_parameters"].peak_mib < step["written_backward"].peak_mib


@claim
def merged_gate_memory():
    step = steps("gpt2")
    assert (
        no_gain("merged_gate") and 2.1 < (step["merged_gate"].peak_mib - step["written_backward"].peak_mib) / 1024 < 2.2
    )


@claim
def written_backward_memory():
    for size in ("gpt2", "gpt2-medium"):
        step = steps(size)
        assert not ahead(step["written_backward"], step["all"]) and not ahead(step["all"], step["written_backward"])
        assert step["all"].peak_mib < 0.9 * step["written_backward"].peak_mib


@claim
def captured_options():
    options = rows("h200-x2/data_parallel_results").query("study == 'options' and gpus == 2").set_index("options")
    base = options.loc["captured=True"]
    for option, row in options.drop("captured=True").iterrows():
        if "copy_engine" in option:
            assert ahead(row, base)
        elif "priority" in option:
            assert not ahead(row, base) and not ahead(base, row)
        else:
            assert ahead(base, row)


@claim
def board_2025_second():
    board = rows("h200/leaderboard_results").sort_values("median_ms")
    first, second, third = (board.iloc[index] for index in range(3))
    assert first.implementation == "flash_attention_4" and second.implementation == "flash_attention_triton"
    assert ahead(first, second) and ahead(second, third)


@claim
def board_2025_floor():
    flops = cost.attention_flops(1, 16, 16384, 16384, 64, True, "forward_backward")
    peak = PEAK_TFLOPS["NVIDIA H200"]["bf16"]
    assert f"{flops / 1e12:.2f} {1e3 * flops / peak / 1e12:.2f} {peak:.1f}" == "1.92 1.94 989.5"


@claim
def board_2026_floor():
    config = ModelConfig(
        **{
            "vocab_size": 151936,
            "context_length": 32768,
            "d_model": 4096,
            "d_ff": 11008,
            "num_layers": 34,
            "num_heads": 32,
        }
    )
    parameters, flops = cost.model_parameters(config), 65536 * cost.train_flops_per_token(config)
    seconds = flops / 2 / (1e12 * PEAK_TFLOPS["NVIDIA H200"]["bf16"])
    shown = f"{parameters / 1e9:.2f} {16 * parameters / 1e9:.0f} {flops / 1e15:.2f} {seconds:.2f}"
    assert shown == "8.13 130 4.74 2.40"


@claim
def host_bound():
    eager = rows("h200/model_benchmark_results").query(
        "compiled == 'no' and mode == 'forward_backward' and dtype == 'bf16'"
    )
    times = eager.pivot(index="size", columns="context_length", values="mean_ms")
    for size, longest in (("small", 512), ("medium", 512), ("large", 256), ("xl", 256), ("2.7b", 256)):
        assert times.loc[size, 2 * longest] < 1.25 * times.loc[size, longest], size
    assert (times.loc[["small", "medium", "large"], 2048] > 2 * times.loc[["small", "medium", "large"], 512]).all()


@claim
def bench_repeat():
    again = rows("h200/model_benchmark_repeat").set_index("size").median_ms
    first = rows("h200/model_benchmark_results").query("context_length == 512 and dtype == 'bf16' and compiled == 'no'")
    ratio = again / first[first["mode"] == "full_step"].set_index("size").median_ms
    assert set(ratio[(ratio - 1).abs() > 0.05].index) == {"medium", "large"}


@claim
def warmup():
    times = rows("h200/model_benchmark_warmup").time_ms
    means = {skipped: times[skipped : skipped + 10].mean() for skipped in (0, 1, 2, 5)}
    assert means[0] > 2 * means[5] and times[:10].std() > means[0]
    assert all(means[skipped] - means[5] < times[skipped : skipped + 10].std() for skipped in (1, 2))


@claim
def profile_agrees():
    forward = rows("h200/profiling_results").query("mode == 'inference' and phase == 'forward'")
    busy = forward[forward.busy_ms > 0.95 * forward.traced_ms]
    assert len(busy) > 4 and (busy.traced_ms / busy.timed_ms < 1.02).all()


def profiled(mode, dtype):
    kernels = rows("h200/profiling_kernels").query("mode == @mode and dtype == @dtype and context_length == 1024")
    return kernels[(kernels["size"] == "2.7b") & (kernels.phase != "optimizer")].groupby("name").total_ms.sum()


@claim
def profile_top():
    assert profiled("inference", "fp32").idxmax().startswith("sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize128x128x8")
    assert "cutlass_80_simt_sgemm_256x128_8x4" in profiled("training", "fp32").idxmax()
    assert profiled("inference", "bf16").idxmax().startswith("nvjet_sm90_tst_320x128")
    assert "direct_copy_kernel_cuda" in profiled("training", "bf16").idxmax()


@claim
def profile_adamw():
    kernels = rows("h200/profiling_kernels").query("mode == 'training'")
    keys = ["size", "dtype", "context_length"]
    share = kernels[kernels.phase == "optimizer"].groupby(keys).total_ms.sum() / kernels.groupby(keys).total_ms.sum()
    assert share.idxmax() == ("2.7b", "bf16", 256) and 0.45 < share.max() < 0.55
    assert all(share[point].is_monotonic_decreasing for point in share.index.droplevel(2).unique())


@claim
def profile_softmax():
    kernels = rows("h200/profiling_kernels").query("mode == 'inference'")
    keys = ["size", "dtype", "context_length"]
    softmax = kernels[kernels.part == "softmax"].groupby(keys).total_ms.sum()
    products = kernels[kernels.part.isin(("scores", "values")) & (kernels.category == "matrix products")]
    ratio = softmax / products.groupby(keys).total_ms.sum()
    assert (ratio.xs("fp32", level="dtype") < 1).all() and (ratio.xs("bf16", level="dtype") > 1).all()
    assert ratio["2.7b"]["bf16"].idxmax() == 1024


def allreduce():
    reduced = rows("h200-x2/collectives_results").query("op == 'all_reduce'")
    return cost.Link.fit("all_reduce", 2, list(reduced.size_mib * 2**20), list(reduced.median_ms / 1e3))


@claim
def allreduce_line():
    link = allreduce()
    half = link.latency_s * link.bandwidth / 2**20
    times = rows("h200-x2/collectives_results").query("op == 'all_reduce'").set_index("size_mib").median_ms
    assert f"{1e3 * times[1]:.0f} {times[1024]:.1f}" == "23 3.3"
    assert f"{1e6 * link.latency_s:.1f} {link.bandwidth / 1e9:.0f} {half:.1f}" == "20.4 305 5.9"


@claim
def ddp_messages():
    sizes = cost.parameter_sizes(model_size("xl"))
    assert f"{len(sizes)} {4 * sum(sizes) / 1e9:.2f} {4 * min(sizes) / 1e3:.1f}" == "339 7.99 6.4"


@claim
def bucket_model():
    link, size = allreduce(), 4 * sum(cost.parameter_sizes(model_size("xl")))
    best = (size * link.bandwidth * link.latency_s) ** 0.5
    overhead = 2 * (size * link.latency_s / link.bandwidth) ** 0.5
    assert f"{size / 1e6:,.0f} {best / 1e6:.0f} {size / best:.0f} {1e3 * overhead:.1f}" == "7,993 223 36 1.5"


def captured_xl():
    captured = rows("h200-x2/data_parallel_results").query(
        "study == 'captured' and gpus == 2 and options == 'captured=True'"
    )
    return captured[captured["size"] == "xl"].set_index("wrapper")


@claim
def ddp_order():
    assert ahead(captured_xl().loc["flat"], captured_xl().loc["naive"])


@claim
def ddp_overlap_faster():
    assert ahead(captured_xl().loc["overlap"], captured_xl().loc["flat"])


@claim
def flashddp_faster():
    assert all(ahead(captured_xl().loc["flashddp"], captured_xl().loc[other]) for other in ("naive", "torch_ddp"))


@claim
def buckets():
    sizes = rows("h200-x2/data_parallel_results").query("study == 'buckets' and gpus == 2")
    assert fastest(sizes, sizes.bucket_mb == 1000)
    step = sizes.set_index("bucket_mb")
    assert all(ahead(step.loc[large], step.loc[small]) for large in (25, 100) for small in (1, 10))


@claim
def scaling_alike():
    scaling = rows("h200-x2/data_parallel_results").query("study == 'scaling' and gpus == 2")
    assert alike(scaling)
    assert [round(100 * value, 1) for value in sorted(scaling.scaling_efficiency)][::2] == [92.5, 94.3]


@claim
def datasheet():
    peaks = PEAK_TFLOPS["NVIDIA H200"]
    assert [round(peaks[dtype]) for dtype in ("fp32", "tf32", "bf16", "fp16")] == [67, 495, 990, 990]


@claim
def sums():
    ends = rows("h200/mixed_precision_sums").query("additions == 1000")
    cast = ends.query("accumulator == 'fp32' and addend == 'fp16'")
    assert len(cast) == 2 and cast["sum"].nunique() == 1
    assert abs(cast.error.iloc[0] - 1000 * (0.010002136230 - 0.01)) < 1e-5


@claim
def norm_overflow():
    norm = rows("h200/mixed_precision_layer_norm").query("what == 'scale'")
    low = norm[norm.statistics == "all low"]
    fp16, bf16 = low[low.dtype == "fp16"], low[low.dtype == "bf16"]
    assert fp16[fp16.square_overflows].value.min() == 64 and fp16[fp16.lost].value.min() == 16
    assert not bf16.square_overflows.any() and not bf16.lost.any() and bf16.value.max() == 4096


@claim
def speed_grows():
    rate = rows("h200/model_benchmark_results").query(
        "compiled == 'no' and context_length == 512 and mode == 'forward_backward'"
    )
    times = rate.pivot(index="size", columns="dtype", values="mean_ms").loc[["small", "medium", "large", "xl", "2.7b"]]
    assert (times.fp32 / times.bf16).is_monotonic_increasing
    small = rate[rate["size"] == "small"].set_index("dtype")
    assert ahead(small.loc["tf32"], small.loc["bf16"])


@claim
def memory_at_peak():
    timeline = rows("h200/memory_timeline")
    parts = ["parameters", "optimizer", "other", "gradients", "activations", "temporary"]
    total = timeline[[f"{part}_mib" for part in parts]].sum(axis=1)
    highest = timeline.loc[total.groupby([timeline["mode"], timeline.context_length]).idxmax()]
    assert list(highest.change) == [2096, 2070, 5992, 1534]


@claim
def memory_oom():
    peaks = rows("h200/memory_peaks").query("mode == 'full_step' and context_length == 2048")
    status = peaks.groupby("kernel").status.unique().map(list)
    assert status["vectorized_torch"] == ["oom"] and status["flash_attention_triton"] == ["ok"]


@claim
def memory_stream():
    stream = rows("h200/memory_allocations").query("kind == 'stream'")
    for context, mib in ((128, 5), (2048, 80)):
        of_context = stream[stream.context_length == context]
        added = of_context[of_context["stack"].str.match(r"model.py:\d+ TransformerBlock.forward <")]
        assert set(of_context.size_mib) == {mib} and added["count"].sum() == 64


@claim
def memory_formula():
    batch, tokens, d, f, heads = 4, 2048, 2560, 10240, 32
    parts = {
        "feed-forward": 8 * batch * tokens * f,
        "attention": 12 * batch * tokens * d + 4 * batch * tokens * heads,
        "cast weights": 2 * (4 * d * d + 3 * d * f),
        "norms": 8 * batch * tokens * (d + 1),
        "streams": 8 * batch * tokens * d,
        "inputs": 6 * batch * tokens * d,
        "rotation": 4 * tokens * d // heads,
    }
    assert [round(size / 2**20, 1) for size in parts.values()] == [640, 241, 200, 160.1, 160, 120, 0.6]
    measured = rows("h200/memory_residuals").query("what == 'block'").mib.sum()
    assert round(sum(parts.values()) / 2**20) == round(measured) == 1522


def strategy(name):
    return rows("h200/memory_checkpointing").set_index("strategy").loc[name]


@claim
def checkpointing_each():
    assert all(strategy("1").peak_mib < strategy(other).peak_mib for other in ("none", "2", "4"))
    assert 1.25 < (32 * 80 / 1522) ** 0.5 < 1.35


@claim
def checkpointing_nested():
    assert abs(strategy("nested").peak_mib - strategy("1").peak_mib) < 10 and ahead(strategy("1"), strategy("nested"))


@claim
def checkpointing_loss():
    assert rows("h200/memory_checkpointing").loss.nunique() == 1


@claim
def sharding_state():
    config = model_size("xl")
    shown = {
        "replicated": [(4, 4, 8), (4, 4, 8)],
        "zero1": [(4, 4, 4), (4, 4, 1)],
        "zero2": [(4, 2, 4), (4, 0.5, 1)],
        "fsdp": [(2, 2, 4), (0.5, 0.5, 1)],
    }
    for sharding, states in shown.items():
        for gpus, state in zip((2, 8), states, strict=True):
            sizes = cost.training_state(config, sharding, gpus).values()
            assert [size / cost.model_parameters(config) for size in sizes] == pytest.approx(state, rel=1e-3)


def shardings():
    return rows("h200-x2/sharding_results").set_index("sharding")


@claim
def zero2_no_less():
    assert shardings().peak_mib["zero2"] > shardings().peak_mib["zero1"]


@claim
def zero1_alike():
    step = shardings()
    assert alike(step.loc[["replicated", "zero1"]]) and alike(step.loc[["replicated", "fsdp"]])
    assert ahead(step.loc["replicated"], step.loc["zero2"])


@claim
def fsdp_faster():
    step = shardings()
    assert ahead(step.loc["fsdp"], step.loc["torch_fsdp2"])
    assert abs(step.peak_mib["fsdp"] / step.peak_mib["torch_fsdp2"] - 1) < 0.01


def uncovered(wrapper):
    """Milliseconds of communication that begins in the traced forward pass, and of it those without computation."""
    trace = rows("h200-x2/sharding_timeline").query("wrapper == @wrapper")
    (forward,) = trace[(trace.lane == "phase") & (trace.name == "forward")].itertuples()
    trace = trace[trace.start_ms < forward.start_ms + forward.duration_ms]
    edges = [
        (at, lane, sign)
        for lane, start, duration in trace[["lane", "start_ms", "duration_ms"]].itertuples(index=False)
        for at, sign in ((start, 1), (start + duration, -1))
    ]
    active, before, total, alone = {"compute": 0, "communication": 0, "phase": 0}, 0.0, 0.0, 0.0
    for at, lane, sign in sorted(edges):
        if active["communication"]:
            total += at - before
            alone += 0 if active["compute"] else at - before
        active[lane] += sign
        before = at
    return round(total), round(alone)


@claim
def gathers():
    assert uncovered("fsdp") == (89, 62) and uncovered("torch_fsdp2") == (129, 106)


@claim
def accounting():
    xxl, tokens = cost.XXL, 1024
    saved = xxl.activation_bytes(tokens)
    assert f"{xxl.parameters / 1e9:.1f} {xxl.state_bytes / 1e12:.2f} {xxl.state_bytes / 80e9:.0f}" == "219.8 3.52 44"
    assert f"{saved / tokens / 1e6:.1f} {saved / 1e9:.1f} {saved / 80e9:.2f}" == "17.5 18.0 0.22"
    assert (xxl.devices_for(0, 95e9), xxl.devices_for(tokens, 95e9)) == (38, 41)
    assert f"{xxl.tokens_per_device(16, 4, cost.TPU_V5P, 2):.0f}" == "319"


@claim
def ring():
    whole = (8 - 1) * 2**30 / 3e11  # a ring that passes whole tensors
    usual = cost.Link(0.0, 3e11).seconds("all_reduce", 2**30, 8)
    assert f"{1e3 * whole:.1f} {1e3 * usual:.1f}" == "25.1 6.3"


@claim
def bounds():
    layer, device = cost.FeedForward(cost.XXL.d_model, cost.XXL.d_ff), cost.TPU_V5P
    assert f"{device.intensity:,.0f}" == "2,556" and int(layer.most_tensor(device)) == 32
    tokens = [2**16, 2**18, 2**20, 2**22]
    assert [int(layer.most_data_parallel(count, device)) for count in tokens] == [26, 103, 411, 1642]
    assert [int(layer.most_mixed(count, device)) for count in tokens] == [859, 3340, 13266, 52969]
    shared = [int(layer.most_mixed(count, device, overlapped=False)) for count in tokens]
    assert shared == [229, 869, 3430, 13673]


@claim
def faults_lose_nothing():
    faults = rows("h200/faults_results")
    assert (faults.nothing_lost == faults.tried).all() and (faults.status == "ok").all()
    saving = rows("h200/saving_results").set_index("mode")
    assert not ahead(saving.loc["none"], saving.loc["asynchronous"])
    assert ahead(saving.loc["asynchronous"], saving.loc["synchronous"])


def test_every_claim_of_a_page_has_a_check_and_every_check_a_page():
    claimed = set(re.findall(r"<!-- claim: (\w+) -->", "\n".join(page.read_text(encoding="utf-8") for page in PAGES)))
    assert claimed == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_claim_holds(name):
    CHECKS[name]()
