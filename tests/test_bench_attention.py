import json
import math
import pickle

import pandas as pd
import pytest
import torch

from lmsys import attention as kernels
from lmsys import cost
from lmsys.attention import Explanation
from lmsys.attention.reference import reference_attention
from lmsys.bench import ahead, attention, experiment, standings

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU Triton runs nothing on the CPU")
TRITON, PORTABLE = "flash_attention_triton", "flash_attention_triton (portable)"
SLOW = {name for name, kernel in kernels.KERNELS.items() if kernel.slow}


def parameters(scale="smoke", **given):
    return attention.NOTEBOOK.parameters({"scale": scale, "device": "cpu"} | given)


def run(folder, p):
    """All rows of a run."""
    keep = attention.other_groups(p) if p.keep else None
    return experiment.run(attention.SWEEP, p, folder=folder, keep=keep, say=lambda text: None)


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    monkeypatch.setattr(attention, "_current", None)


# --- Parameters and points ------------------------------------------------------------------------


def test_power_of_two_tiers():
    assert attention.parse_tier("128:64") == ("128:64", (128, 64))
    for bad in ("100:64", "64:100", "0:64", "64", "64:", ":64", "-64:64", "64:64:64", "a:b"):
        with pytest.raises(ValueError, match="tier"):
            attention.parse_tier(bad)


def test_parameters_fill_from_the_scale_and_keep_what_is_given():
    p = parameters(kernels="vectorized_torch", custom_tiers=["16:32"], causal="false", iters=3)
    assert p.kernels == ["vectorized_torch"] and p.tiers == {"16:32": (16, 32)} and p.groups == ["tiers"]
    assert p.causal == [False] and p.iters == 3 and p.kv_heads == p.heads
    full = parameters("full")
    assert set(full.kernels) == set(kernels.KERNELS) and full.dtypes == ["bf16"]
    assert {(n, n) for n in (2048, 4096, 8192, 16384)} <= set(map(tuple, full.tiers.values()))
    assert (full.batch, full.heads, full.head_dim) == (4, 12, 64) and any(q != k for q, k in full.tiers.values())
    for bad, message in (
        ({"passes": ["forwards"]}, "unknown passe? 'forwards'. Did you mean 'forward'"),
        ({"heads": 3, "kv_heads": 2}, "heads 3 is not a multiple of kv_heads 2"),
        ({"iters": 0}, "iters is 0"),
        ({"device": "tpu"}, "unknown device"),
    ):
        with pytest.raises(ValueError, match=message):
            parameters(**bad)


def test_groups_of_the_full_sweep():
    p = parameters("full")
    found = {group: [s for s in attention.shapes(p) if s["tier"] == group] for group in standings.GROUPS}
    lengths = (512, 1024, 2048, 4096, 8192, 16384, 32768)

    def values(group, *names):
        return {tuple(shape[name] for name in names) for shape in found[group]}

    assert values("throughput", "q_len", "head_dim", "causal") == {
        (n, d, causal) for n in lengths for d in (64, 128) for causal in (True, False)
    }
    assert {s["batch"] * s["q_len"] for s in found["throughput"] if s["q_len"] <= 16384} == {16384}
    assert {s["batch"] for s in found["throughput"] if s["q_len"] == 32768} == {1}
    assert {s["heads"] * s["head_dim"] for s in found["throughput"]} == {2048}
    assert all(s["kv_heads"] == s["heads"] for s in found["throughput"])
    assert {(s["q_len"], s["head_dim"], s["heads"] // s["kv_heads"]) for s in found["grouped_query"]} == {
        (n, d, ratio) for n in (4096, 16384) for d in (64, 128) for ratio in (4, 8)
    }
    assert values("grouped_query", "causal") == {(True,)} and values("few_blocks", "head_dim") == {(64,), (128,)}
    few = values("few_blocks", "batch", "heads", "q_len", "k_len", "causal")
    assert few == {(1, 4, n, 32768, False) for n in (128, 1024)}
    points = attention.points(p)
    assert {point["kernel"] for point in points if point["tier"] == "throughput"} == set(kernels.KERNELS) - SLOW
    assert {point["kernel"] for point in points if point["tier"] == "small"} == set(kernels.KERNELS)


def test_a_shape_of_the_tiers_selects_them():
    assert parameters("full", head_dim=128).groups == ["tiers"]
    assert parameters("full", kernels=["vectorized_torch"]).groups == ["tiers"]
    assert parameters("full", causal=[True]).groups == list(standings.GROUPS)
    for bad, message in (
        ({"groups": ["throughput"], "batch": 2}, "are of the group 'tiers'"),
        ({"groups": ["throughput"], "kernels": ["vectorized_torch"]}, "measured in the group 'tiers' only"),
        ({"groups": ["throughputs"]}, "unknown group 'throughputs'. Did you mean 'throughput'"),
        ({"groups": []}, "groups must not be empty"),
    ):
        with pytest.raises(ValueError, match=message):
            parameters("full", **bad)


# --- Rows -----------------------------------------------------------------------------------------


def test_a_sweep_has_every_point_and_its_report(tmp_path):
    names = ["scaled_dot_prod_attention", "vectorized_torch", "flash_attention_torch", "torch_sdpa_cudnn"]
    passes = ["forward", "backward", "forward_backward"]
    frame = run(
        tmp_path, parameters(kernels=names, custom_tiers=["64:64", "32:64"], passes=passes, causal=[True, False])
    )
    assert tuple(frame.columns[:16]) == (
        *("kernel", "batch", "heads", "q_len", "k_len", "head_dim", "dtype", "causal", "pass", "status"),
        *("median_ms", "p20_ms", "p80_ms", "samples", "tflops", "peak_mib"),
    )
    assert len(frame) == 4 * 2 * 3 * 2 and set(frame.status) == {"ok", "unsupported"}
    ok = frame[frame.status == "ok"]
    assert set(frame[frame.status != "ok"].kernel) == {"torch_sdpa_cudnn"}
    assert (ok.median_ms > 0).all() and (ok.p20_ms <= ok.median_ms).all() and (ok.median_ms <= ok.p80_ms).all()
    assert (ok.error <= 2 * ok.error_pytorch + 4e-6).all() and (ok.peak_mib > 0).all()
    row = ok[(ok.q_len == 64) & ok.causal & (ok["pass"] == "backward")].iloc[0]
    flops = cost.attention_flops(1, 1, 64, 64, 16, True, "backward")
    assert row.tflops == pytest.approx(flops / row.median_ms / 1e9, rel=1e-3)
    report = attention.report_text(frame)
    assert (
        "## tiers: backward, fp32, head_dim 16, not causal" in report and "| torch_sdpa_cudnn | unsupported" in report
    )


def test_a_wrong_kernel_is_an_error_row_and_not_a_time(monkeypatch, tmp_path):
    """The check before the clock: a kernel that forgets the mask is caught, and one that is wrong in dv alone."""
    passes = ["forward", "backward"]
    p = parameters(kernels=["vectorized_torch"], passes=passes, custom_tiers=["32:32"], heads=4, kv_heads=1)

    def unmasked(q, k, v, *, causal, kernel):
        return reference_attention(q, k, v, causal=False)[0]

    def half_dv(q, k, v, *, causal, kernel):
        half = v / 2
        return reference_attention(q, k, half + (v - half).detach(), causal=causal)[0]

    monkeypatch.setattr(attention, "attention", unmasked)
    frame = run(tmp_path, p)
    assert frame.status.tolist() == ["error", "error"]
    assert frame.note.str.contains("wrong").all() and frame.median_ms.isna().all() and (frame.error > 1e-3).all()
    monkeypatch.setattr(attention, "attention", half_dv)
    monkeypatch.setattr(attention, "_current", None)
    forward, backward = run(tmp_path, p).to_dict("records")
    assert forward["status"] == "ok" and backward["status"] == "error" and "wrong" in backward["note"]


def test_a_backward_pass_that_fails_leaves_the_forward_pass_its_row(monkeypatch, tmp_path):
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, causal):
            return reference_attention(q, k, v, causal=causal)[0]

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no such kernel image\nsecond line")

    monkeypatch.setattr(attention, "attention", lambda q, k, v, *, causal, kernel: NoBackward.apply(q, k, v, causal))
    p = parameters(kernels=["vectorized_torch"], custom_tiers=["32:32"], passes=["forward", "backward"])
    forward, backward = run(tmp_path, p).to_dict("records")
    assert forward["status"] == "ok" and forward["median_ms"] > 0
    assert backward["status"] == "error" and backward["note"] == "RuntimeError: no such kernel image"


@interpreted
def test_the_portable_path_is_measured_beside_another_default(monkeypatch, tmp_path):
    """As on a Hopper GPU: flash_attention_triton twice, the row saying which path each pass took."""
    asked = []

    def explain(q, k, v, causal, *, path="auto"):
        name = "hopper" if path == "auto" else path
        return Explanation(name, name, ())

    def answer(q, k, v, *, causal, kernel, **options):
        asked.append(options.get("path"))
        return reference_attention(q, k, v, causal=causal)[0]

    monkeypatch.setattr(attention, "explain", explain)
    monkeypatch.setattr(attention, "attention", answer)
    p = parameters(groups=["throughput"], kernels=[TRITON], passes=["forward", "backward"])
    frame = run(tmp_path, p)
    assert frame[["pass", "path"]].values.tolist() == [
        *(["forward", "hopper"], ["forward", "portable"]),
        *(["backward", "hopper"], ["backward", "portable"]),
    ]
    assert set(frame.status) == {"ok"} and set(asked) == {None, "portable"}
    assert attention.styles(standings.with_series(frame).series)[PORTABLE][2]
    monkeypatch.setattr(attention, "explain", lambda *_, **__: Explanation("portable", "portable", ()))
    assert run(tmp_path, p).path.tolist() == ["portable", "portable"]


@interpreted
def test_a_path_that_the_environment_forces_and_that_refuses_is_a_row(monkeypatch, tmp_path):
    monkeypatch.setenv("LMSYS_FLASH_PATH", "hopper")
    forced, portable = run(tmp_path, parameters(groups=["throughput"], kernels=[TRITON])).to_dict("records")
    assert forced["status"] == "unsupported" and "hopper" in forced["note"]
    assert portable["status"] == "ok" and portable["path"] == "portable"


def test_keep_leaves_the_rows_of_other_groups(tmp_path):
    def measure(keep, *groups):
        return run(tmp_path, parameters(kernels=["torch_sdpa_flash"], keep=keep, groups=list(groups)))

    first = measure(False, "throughput")
    both = measure(True, "tiers")
    assert list(both.tier) == ["throughput", "small", "wide"]
    pd.testing.assert_frame_equal(both[:1], first, check_dtype=False)
    stamp = json.loads((tmp_path / "attention_sweep_results.json").read_text())
    assert stamp["kept"]["parameters"]["groups"] == ["throughput"] and "environment" in stamp["kept"]
    assert list(measure(True, "throughput").tier) == ["small", "wide", "throughput"]
    assert list(measure(False, "throughput").tier) == ["throughput"]
    path = tmp_path / "attention_sweep_results.csv"
    first.assign(device="another GPU").to_csv(path, index=False)
    with pytest.raises(ValueError, match="was measured on another GPU"):
        measure(True, "tiers")
    first.drop(columns="path").to_csv(path, index=False)
    with pytest.raises(ValueError, match="not those of this version"):
        measure(True, "tiers")


def test_out_of_memory_is_a_row_and_the_sweep_goes_on(monkeypatch, tmp_path):
    """A CPU's free memory is asked for first: its own end of it would end the process."""
    monkeypatch.setattr(attention, "available_bytes", lambda: 1000)
    p = parameters(kernels=["vectorized_torch", "flash_attention_torch"], custom_tiers=["32:32"])
    first, second = run(tmp_path, p).to_dict("records")
    assert first["status"] == "oom" and "GiB are free" in first["note"] and second["status"] == "ok"


def test_compiling_ahead_covers_each_compilation_once(monkeypatch):
    asked = []
    monkeypatch.setattr(ahead, "compile_points", lambda call, points, p, processes, limit_s: asked.extend(points))
    p = parameters("full", passes=["forward", "backward"])
    attention.compile_ahead(p)
    flex, triton = ([point for point in asked if point["kernel"] == name] for name in ("torch_flex", TRITON))
    assert len(flex) == len(attention.shapes(p)) and len(triton) < len(flex)
    assert {(t["head_dim"], t["causal"]) for t in triton} == {
        (d, causal) for d in (64, 128) for causal in (True, False)
    }
    pickle.dumps((asked, p))  # to the processes that compile
    small = parameters(kernels=["vectorized_torch"], custom_tiers=["16:16"])
    attention.compile_point(attention.points(small)[0], small)
    assert attention._current.shape["q_len"] == 16


# --- Standings ------------------------------------------------------------------------------------

SPEEDS = {"hopper": 525, "portable": 410, "torch_flex": 400, "torch_sdpa_cudnn": 450, "flash_attention_4": 500}


def full_frame(speed=lambda series, which, shape: SPEEDS.get(series, 300)):
    """Rows of a full sweep as on a Hopper GPU. speed: (path or kernel, pass, shape) -> TFLOP/s, or a status."""
    found = []
    p = parameters("full")
    for point in attention.points(p):
        for path in ("hopper", "portable") if point["kernel"] == TRITON else (None,):
            row = {key: value for key, value in point.items() if key != "options"} | {"path": path, "status": "ok"}
            reached = speed(path or point["kernel"], point["pass"], point)
            size = (point[key] for key in ("batch", "heads", "q_len", "k_len", "head_dim", "causal", "pass"))
            if isinstance(reached, str):
                found.append(row | {"status": reached})
            else:
                ms = cost.attention_flops(*size) / reached / 1e9
                found.append(row | {"median_ms": ms, "p20_ms": ms, "p80_ms": ms, "tflops": reached})
    return pd.DataFrame(found)


def judged(frame, **options):
    table = standings.standings(frame, [TRITON, PORTABLE], ["flash_attention_4", "torch_flex"], **options)
    return {(row["ours"], row["peer"], row["pass"]): row for row in table.to_dict("records")}


def test_standings_of_a_sweep():
    rows = judged(full_frame())
    row = rows[TRITON, "flash_attention_4", "forward"]
    assert row["geomean"] == row["least"] == row["most"] == pytest.approx(1.05) and row["verdict"] == "ahead"
    assert row["points"] == 36 and row["lost"] == 0  # 28 of throughput and 8 of grouped_query
    assert rows[PORTABLE, "torch_flex", "backward"]["geomean"] == pytest.approx(410 / 400)
    assert rows[PORTABLE, "flash_attention_4", "backward"]["verdict"] == "behind"
    assert judged(full_frame(), groups=("few_blocks",))[TRITON, "torch_flex", "forward"]["points"] == 4
    assert judged(full_frame(), from_len=1024)[TRITON, "torch_flex", "forward"]["points"] == 32
    wide = full_frame().assign(p80_ms=lambda frame: 1.2 * frame.median_ms)
    assert judged(wide)[TRITON, "flash_attention_4", "forward"]["verdict"] == "within noise"


def test_slow_points_and_points_without_a_time():
    def speed(series, which, shape):
        slow = shape["tier"] == "throughput" and (shape["q_len"], shape["head_dim"], shape["causal"]) == (512, 64, True)
        if series == "hopper" and slow:
            return 450.0 if which == "forward" else "error"
        return SPEEDS.get(series, 300)

    rows = judged(full_frame(speed))
    forward, backward = (rows[TRITON, "flash_attention_4", which] for which in ("forward", "backward"))
    assert forward["geomean"] == pytest.approx(math.exp((35 * math.log(1.05) + math.log(0.9)) / 36))
    assert forward["least"] == pytest.approx(0.9) and forward["least_at"] == "512 tokens, head_dim 64, causal"
    assert backward["lost"] == 1 and backward["points"] == 35
    no_peer = full_frame(lambda series, *_: "oom" if series == "flash_attention_4" else SPEEDS.get(series, 300))
    assert not any(peer == "flash_attention_4" for _, peer, _ in judged(no_peer))


def test_where_the_portable_path_is_the_default_it_stands_for_both():
    frame = full_frame()
    frame = frame[frame.path.isna() | (frame.path == "portable")]
    rows = judged(frame)
    assert set(standings.with_series(frame).series) == set(frame.kernel)
    for ours in (TRITON, PORTABLE):
        assert rows[ours, "torch_flex", "forward"]["geomean"] == pytest.approx(410 / 400)
