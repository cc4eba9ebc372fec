import json
import math

import pandas as pd
import pytest
import torch

from lmsys import attention as kernels
from lmsys import cost, plots
from lmsys.attention.reference import reference_attention
from lmsys.bench import attention, standings
from lmsys.records import REPOSITORY, SCHEMAS, read_results

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU Triton runs nothing on the CPU")
CPU = torch.device("cpu")


def test_power_of_two_tiers():
    tier = attention.parse_tier("128:64")
    assert (tier.q_len, tier.k_len) == (128, 64)
    for bad in ("100:64", "64:100", "0:64", "64", "64:", ":64", "-64:64", "64:64:64", "a:b"):
        with pytest.raises(ValueError, match="tier"):
            attention.parse_tier(bad)


def test_settings_fill_from_the_scale_and_keep_what_is_given():
    sweep = attention.settings(
        "smoke", kernels=["vectorized_torch"], custom_tiers=["16:32"], causal=False, iterations=3
    )
    assert sweep.kernels == ("vectorized_torch",) and str(sweep.tiers[0]) == "16:32"
    assert sweep.causal == (False,) and sweep.iterations == 3 and sweep.kv_heads == sweep.heads
    full = attention.settings("full")
    assert set(full.kernels) == set(kernels.KERNELS) and full.dtypes == ("bf16",)
    assert {2048, 4096, 8192, 16384} <= {tier.q_len for tier in full.tiers if tier.q_len == tier.k_len}
    assert (full.batch, full.heads, full.head_dim) == (4, 12, 64)
    assert any(tier.q_len != tier.k_len for tier in full.tiers)


def test_groups_of_the_full_sweep():
    sweep = attention.settings("full", device="cpu")
    points = {group: [c for c in attention.cases(sweep) if c.group == group] for group in attention.GROUPS}
    throughput = points["throughput"]
    assert {(c.q_len, c.head_dim, c.causal) for c in throughput} == {
        (n, d, causal)
        for n in (512, 1024, 2048, 4096, 8192, 16384, 32768)
        for d in (64, 128)
        for causal in (True, False)
    }
    assert {c.batch * c.q_len for c in throughput if c.q_len <= 16384} == {16384}
    assert {c.batch for c in throughput if c.q_len == 32768} == {1}
    assert {c.heads * c.head_dim for c in throughput} == {2048} and all(c.kv_heads == c.heads for c in throughput)
    assert {(c.q_len, c.head_dim, c.heads // c.kv_heads) for c in points["grouped_query"]} == {
        (n, d, ratio) for n in (4096, 16384) for d in (64, 128) for ratio in (4, 8)
    }
    assert all(c.causal for c in points["grouped_query"])
    few = points["few_blocks"]
    assert {(c.batch, c.heads, c.q_len, c.k_len, c.causal) for c in few} == {
        (1, 4, n, 32768, False) for n in (128, 1024)
    }
    assert {c.head_dim for c in few} == {64, 128}
    slow = {"scaled_dot_prod_attention", "vectorized_torch", "vectorized_torch_compiled", "flash_attention_torch"}
    assert set(attention.kernels_of(sweep, throughput[0])) == set(kernels.KERNELS) - slow
    assert set(attention.kernels_of(sweep, points["tiers"][0])) == set(kernels.KERNELS)


def test_a_shape_of_the_tiers_selects_them():
    assert attention.settings("full", head_dim=128, device="cpu").groups == ("tiers",)
    assert attention.settings("full", kernels=["vectorized_torch"], device="cpu").groups == ("tiers",)
    assert attention.settings("full", causal=True, device="cpu").groups == attention.GROUPS
    assert attention.settings("full", groups=["few_blocks", "throughput"]).groups == ("throughput", "few_blocks")
    with pytest.raises(ValueError, match="are of the group 'tiers'"):
        attention.settings("full", groups=["throughput"], batch=2)
    with pytest.raises(ValueError, match="measured in the group 'tiers' only"):
        attention.settings("full", groups=["throughput"], kernels=["vectorized_torch"])
    with pytest.raises(ValueError, match="unknown group 'throughputs'. Did you mean 'throughput'"):
        attention.settings("full", groups=["throughputs"])
    with pytest.raises(ValueError, match="groups must not be empty"):
        attention.settings("full", groups=[])


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    sweep = attention.settings(
        "smoke",
        kernels=["scaled_dot_prod_attention", "vectorized_torch", "flash_attention_torch", "torch_sdpa_cudnn"],
        custom_tiers=["64:64", "32:64"],
        passes=["forward", "backward", "forward_backward"],
        causal=[True, False],
        device="cpu",
    )
    frame = attention.run(sweep, folder)
    frame.attrs["folder"] = folder
    return frame


def test_a_sweep_writes_its_schema_and_every_point(frame):
    assert tuple(frame.columns[:16]) == SCHEMAS["attention_sweep_results"]
    assert len(frame) == 4 * 2 * 3 * 2
    ok = frame[frame.status == "ok"]
    assert set(frame.status) == {"ok", "unsupported"} and set(frame[frame.status != "ok"].kernel) == {
        "torch_sdpa_cudnn"
    }
    assert (ok.median_ms > 0).all() and (ok.p20_ms <= ok.median_ms).all() and (ok.median_ms <= ok.p80_ms).all()
    assert (ok.error <= 2 * ok.error_pytorch + 4e-6).all() and (ok.peak_mib > 0).all()
    row = ok[(ok.q_len == 64) & ok.causal & (ok["pass"] == "backward")].iloc[0]
    flops = cost.attention_flops(1, 1, 64, 64, 16, True, "backward")
    assert row.tflops == pytest.approx(flops / row.median_ms / 1e9, rel=1e-3)


def test_a_sweep_leaves_its_artifacts(frame):
    folder = frame.attrs["folder"]
    written = {path.name for path in attention.write_report(frame, folder).values()}
    assert written == {
        "attention_sweep_forward.png",
        "attention_sweep_backward.png",
        "attention_sweep_forward_backward.png",
        "attention_sweep_heatmap.png",
        "attention_sweep_scaling.png",
        "attention_sweep_report.md",
    }
    assert (folder / "attention_sweep_results.json").exists()
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in written if name.endswith("png"))
    report = (folder / "attention_sweep_report.md").read_text()
    assert "is the fastest at" in report and "agreed with float64" in report and "unsupported" in report


@pytest.mark.parametrize("heads", [1, 4], ids=["plain", "grouped"])
def test_a_wrong_kernel_is_an_error_row_and_not_a_time(monkeypatch, heads):
    """The check before the clock: a kernel that forgets the mask is caught, and one that is wrong in dv alone."""
    sweep = attention.settings(
        "smoke",
        kernels=["vectorized_torch"],
        custom_tiers=["32:32"],
        heads=heads,
        kv_heads=1,
        passes=["forward", "backward"],
        device="cpu",
    )

    def unmasked(q, k, v, *, causal, kernel):
        return reference_attention(q, k, v, causal=False)[0]

    def half_dv(q, k, v, *, causal, kernel):
        half = v / 2
        return reference_attention(q, k, half + (v - half).detach(), causal=causal)[0]

    monkeypatch.setattr(attention, "attention", unmasked)
    found = list(attention.rows(sweep, CPU))
    assert [row["status"] for row in found] == ["error", "error"]
    assert all("wrong" in row["note"] and "median_ms" not in row for row in found)
    monkeypatch.setattr(attention, "attention", half_dv)
    forward, backward = attention.rows(sweep, CPU)
    assert forward["status"] == "ok" and backward["status"] == "error" and "wrong" in backward["note"]


def test_a_backward_pass_that_fails_leaves_the_forward_pass_its_row(monkeypatch):
    sweep = attention.settings(
        "smoke", kernels=["vectorized_torch"], custom_tiers=["32:32"], passes=["forward", "backward"], device="cpu"
    )

    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, causal):
            return reference_attention(q, k, v, causal=causal)[0]

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no such kernel image\nsecond line")

    monkeypatch.setattr(attention, "attention", lambda q, k, v, *, causal, kernel: NoBackward.apply(q, k, v, causal))
    forward, backward = attention.rows(sweep, CPU)
    assert forward["status"] == "ok" and forward["median_ms"] > 0
    assert backward["status"] == "error" and backward["note"] == "RuntimeError: no such kernel image"


@interpreted
def test_the_portable_path_is_measured_beside_another_default(monkeypatch):
    """As on a Hopper GPU: flash_attention_triton twice, the row saying which path each pass took."""
    explained = []

    def explain(q, k, v, causal, *, path="auto"):
        explained.append(path)
        name = "hopper" if path == "auto" else path
        return kernels.Explanation(name, name, ())

    asked = []

    def answer(q, k, v, *, causal, kernel, **options):
        asked.append(options.get("path"))
        return reference_attention(q, k, v, causal=causal)[0]

    monkeypatch.setattr(kernels, "explain", explain)
    monkeypatch.setattr(attention, "attention", answer)
    sweep = attention.settings(
        "smoke", groups=["throughput"], kernels=["flash_attention_triton"], passes=["forward", "backward"], device="cpu"
    )
    found = list(attention.rows(sweep, CPU))
    assert [(row["pass"], row["path"], row["status"]) for row in found] == [
        ("forward", "hopper", "ok"),
        ("forward", "portable", "ok"),
        ("backward", "hopper", "ok"),
        ("backward", "portable", "ok"),
    ]
    assert set(explained) == {"auto", "portable"} and set(asked) == {None, "portable"}
    monkeypatch.setattr(kernels, "explain", lambda *_, **__: kernels.Explanation("portable", "portable", ()))
    assert [row["path"] for row in attention.rows(sweep, CPU)] == ["portable", "portable"]


@interpreted
def test_a_path_that_the_environment_forces_and_that_refuses_is_a_row(monkeypatch):
    monkeypatch.setenv("LMSYS_FLASH_PATH", "hopper")
    sweep = attention.settings("smoke", groups=["throughput"], kernels=["flash_attention_triton"], device="cpu")
    forced, portable = attention.rows(sweep, CPU)
    assert forced["status"] == "unsupported" and "hopper" in forced["note"]
    assert portable["status"] == "ok" and portable["path"] == "portable"


def test_keep_leaves_the_rows_of_other_groups(tmp_path):
    def run(keep, **other):
        sweep = attention.settings("smoke", kernels=["torch_sdpa_flash"], keep=keep, device="cpu", **other)
        return attention.run(sweep, tmp_path)

    first = run(False, groups=["throughput"])
    both = run(True, groups=["tiers"])
    assert list(both.tier) == ["throughput", "small", "wide"]
    pd.testing.assert_frame_equal(both[:1], first, check_dtype=False)
    stamp = json.loads((tmp_path / "attention_sweep_results.json").read_text())
    assert stamp["parameters"]["kept"]["groups"] == ["throughput"] and "environment" in stamp["parameters"]["kept"]
    assert list(run(True, groups=["throughput"]).tier) == ["small", "wide", "throughput"]
    assert list(run(False, groups=["throughput"]).tier) == ["throughput"]
    path = tmp_path / "attention_sweep_results.csv"
    first.assign(device="another GPU").to_csv(path, index=False)
    with pytest.raises(ValueError, match="was measured on another GPU"):
        run(True, groups=["tiers"])
    first.drop(columns="path").to_csv(path, index=False)
    with pytest.raises(ValueError, match="not those of this version"):
        run(True, groups=["tiers"])


def test_compiling_ahead_covers_each_compilation_once(monkeypatch, capsys):
    sweep = attention.settings("full", passes=["forward", "backward"], device="cpu")
    made = attention._compilations(sweep)
    flex = [case for kernel, case in made if kernel == "torch_flex"]
    assert set(flex) == set(attention.cases(sweep)) and len(flex) == len(attention.cases(sweep))
    triton = [case for kernel, case in made if kernel == "flash_attention_triton"]
    assert {(c.head_dim, c.causal) for c in triton} == {(d, causal) for d in (64, 128) for causal in (True, False)}
    assert len(triton) < len(flex)
    small = attention.settings(
        "smoke", kernels=["flash_attention_triton"], groups=["throughput"], compile_ahead=2, device="cpu"
    )
    ran = []
    monkeypatch.setattr(attention.Point, "outputs", lambda point, runner, backward: ran.append(runner.kernel))
    attention._compile_share(small, 0, 1)
    assert ran == ["flash_attention_triton"]

    def fails(point, runner, backward):
        raise RuntimeError("does not compile")

    monkeypatch.setattr(attention.Point, "outputs", fails)
    attention._compile_share(small, 0, 1)
    assert "flash_attention_triton: RuntimeError: does not compile" in capsys.readouterr().out


def test_compiling_ahead_ends_in_time(monkeypatch, capfd):
    """In a process of its own, which is ended when its time is over."""
    small = attention.settings(
        "smoke", kernels=["flash_attention_triton"], groups=["throughput"], compile_ahead=1, device="cpu"
    )
    monkeypatch.setattr(attention, "_COMPILE_LIMIT_S", 60.0)
    attention.compile_ahead(small)
    said = capfd.readouterr()
    assert "not done" not in said.out and "Traceback" not in said.err
    monkeypatch.setattr(attention, "_COMPILE_LIMIT_S", 0.01)
    attention.compile_ahead(small)
    assert "1 of 1 processes were not done after 0.01 s" in capfd.readouterr().out


def test_out_of_memory_is_a_row_and_the_sweep_goes_on(monkeypatch):
    sweep = attention.settings(
        "smoke", kernels=["vectorized_torch", "flash_attention_torch"], custom_tiers=["32:32"], device="cpu"
    )
    monkeypatch.setattr(attention, "available_bytes", lambda: 1000)
    first, second = attention.rows(sweep, torch.device("cpu"))
    assert first["status"] == "oom" and "GiB" in first["note"]
    assert second["status"] == "ok"


def test_flops_count_what_the_mask_leaves():
    assert cost.visible_pairs(8, 8, causal=False) == 64
    assert cost.visible_pairs(8, 8, causal=True) == 32
    assert cost.visible_pairs(4, 8, causal=True) == 8
    assert cost.visible_pairs(8, 4, causal=True) == 8 + 16
    assert cost.attention_flops(2, 3, 8, 8, 16, False, "forward_backward") == 3.5 * 4 * 2 * 3 * 64 * 16


def test_figures_of_the_committed_results():
    """The H200's results are there, whole, and the figures can be drawn from them."""
    folder = REPOSITORY / "artifacts" / "h200"
    frame = read_results(folder / "attention_sweep_results.csv")
    assert set(frame.dtype) == {"bf16"} and set(frame["pass"]) >= {"forward"}
    square = frame[(frame.q_len == frame.k_len) & (frame.head_dim == 64) & (frame.batch == 4) & (frame.heads == 12)]
    assert {2048, 4096, 8192, 16384} <= set(square.q_len)
    assert not (frame.status == "error").any()
    for name in ("attention_sweep_forward.png", "attention_sweep_heatmap.png", "attention_sweep_scaling.png"):
        assert (folder / name).exists()
    figure = plots.attention_scaling(frame)
    assert len(figure.axes) >= 2 and all(math.isfinite(limit) for limit in figure.axes[0].get_xlim())


# --- Standings ------------------------------------------------------------------------------------


def full_frame(speed, passes=("forward", "backward")):
    """Rows of a full sweep as on a Hopper GPU. speed: (kernel, path, pass, case) -> TFLOP/s, or a status."""
    found = []
    sweep = attention.settings("full", passes=passes, device="cpu")
    for case in attention.cases(sweep):
        for kernel in attention.kernels_of(sweep, case):
            for path in ("hopper", "portable") if kernel == standings.TRITON else ("",):
                for which in passes:
                    row = {name: getattr(case, name) for name in ("tier", *standings.CASE)}
                    row |= {
                        "kernel": kernel,
                        "path": path or None,
                        "pass": which,
                        "device": "NVIDIA H200",
                        "note": None,
                    }
                    reached = speed(kernel, path, which, case)
                    if isinstance(reached, str):
                        found.append(row | {"status": reached})
                        continue
                    shape = (case.batch, case.heads, case.q_len, case.k_len, case.head_dim, case.causal, which)
                    ms = cost.attention_flops(*shape) / reached / 1e9
                    row |= {"status": "ok", "median_ms": ms, "p20_ms": ms, "p80_ms": ms, "tflops": reached}
                    found.append(row | {"samples": 20, "peak_mib": 1.0, "error": 1e-3, "error_pytorch": 1e-3})
    return pd.DataFrame(found)


def usual(kernel, path, which, case):
    return {"hopper": 525.0, "portable": 410.0}.get(path) or {
        "torch_flex": 400.0,
        "torch_sdpa_cudnn": 450.0,
        "torch_sdpa_flash": 300.0,
        "flash_attention_4": 500.0,
        "flash_attention_cuda": 310.0,
    }.get(kernel, 20.0)


def judged(frame):
    return {(row["ours"], row["peer"], row["pass"]): row for row in standings.standings(frame) if row["bar"]}


def test_standings_of_a_sweep_that_meets_every_bar():
    rows = judged(full_frame(usual))
    assert len(rows) == len(standings.BARS) and all(row["met"] for row in rows.values())
    row = rows[standings.TRITON, "flash_attention_4", "forward"]
    assert row["geomean"] == pytest.approx(1.05) and row["least"] == row["most"] == pytest.approx(1.05)
    assert row["points"] == 36  # 28 of throughput and 8 of grouped_query
    assert rows[standings.TRITON, "torch_flex", "forward"]["points"] == 40
    assert rows[standings.TRITON, "torch_sdpa_cudnn", "forward"]["points"] == 32  # from 1024
    assert rows[standings.PORTABLE, "torch_flex", "backward"]["geomean"] == pytest.approx(410 / 400)
    assert rows["flash_attention_cuda", "torch_sdpa_flash", "backward"]["geomean"] == pytest.approx(310 / 300)


def test_a_missed_bar_is_said_so():
    """One slow point misses 'none under', a slow pass the geometric mean, a failure of ours both."""

    def speed(kernel, path, which, case):
        slow = case.tier == "throughput" and case.q_len == 512 and case.head_dim == 64 and case.causal
        if path == "hopper" and which == "forward" and slow:
            return 450.0
        if path == "hopper" and which == "backward":
            return "error" if slow else 480.0
        return usual(kernel, path, which, case)

    frame = full_frame(speed)
    rows = judged(frame)
    fa4 = rows[standings.TRITON, "flash_attention_4", "forward"]
    assert fa4["geomean"] == pytest.approx(math.exp((35 * math.log(1.05) + math.log(0.9)) / 36)) and not fa4["met"]
    assert (
        fa4["least"] == pytest.approx(0.9)
        and fa4["least_at"] == "512 tokens, head_dim 64, causal"
        and fa4["under"] == 1
    )
    assert rows[standings.TRITON, "torch_sdpa_cudnn", "forward"]["met"]  # from 1024 on
    backward = rows[standings.TRITON, "flash_attention_4", "backward"]
    assert backward["lost"] == 1 and backward["points"] == 35 and not backward["met"]
    said = standings.sentences(frame)
    (sentence,) = [text for text in said if "Forward" in text and "flash_attention_4" in text]
    assert (
        "**missed**" in sentence and "1 point(s) being under it" in sentence and "least 0.90 at 512 tokens" in sentence
    )
    assert any("1 point(s) having no time of ours" in text for text in said)
    assert "**missed**" in attention.against_peers(
        frame
    ) and "35 (1 without a time of ours)" in attention.against_peers(frame)


def test_peers_that_take_no_part_are_not_judged():
    frame = full_frame(lambda kernel, *rest: "unsupported" if kernel == "flash_attention_4" else usual(kernel, *rest))
    assert not any(peer == "flash_attention_4" for _, peer, _ in judged(frame))
    frame["note"] = "in Triton's CPU interpreter"
    assert "not to be compared" in attention.against_peers(frame)
    assert not any("The bar" in sentence for sentence in attention.conclusions(frame))


def test_where_the_portable_path_is_the_default_it_stands_for_both():
    frame = full_frame(usual)
    frame = frame[frame.path.isna() | (frame.path == "portable")]
    rows = judged(frame)
    assert set(standings.with_series(frame).series) == set(frame.kernel)
    assert rows[standings.PORTABLE, "torch_flex", "forward"]["geomean"] == pytest.approx(410 / 400)
    assert rows[standings.TRITON, "torch_flex", "forward"]["geomean"] == pytest.approx(410 / 400)


def test_a_full_sweep_leaves_its_figures_and_its_report(tmp_path, monkeypatch):
    frame = full_frame(
        lambda kernel, path, which, case: (
            "oom" if usual(kernel, path, which, case) == 20 else usual(kernel, path, which, case)
        )
    )
    written = attention.write_report(frame, tmp_path)
    assert list(written) == ["forward", "tiers_forward", "backward", "tiers_backward", "heatmap", "scaling", "report"]
    report = written["report"].read_text()
    assert "is **missed**" not in report and "The bar, 1.03, none under 0.93, is met." in report
    assert "## throughput: forward, bf16, head_dim 128, causal" in report and "8 heads a key head" in report
    assert "flash_attention_triton (portable)" in report and "ran out of memory" in report
    titles = [axis.get_title(loc="left") for axis in plots.attention_scaling(frame).axes]
    assert "Backward, bf16, causal, head_dim 128" in titles and "Peak memory: forward, bf16, causal" in titles
    monkeypatch.setattr(plots, "save", lambda figure, path: path)
    only = attention.write_report(frame[frame.tier == "few_blocks"], tmp_path)
    assert list(only) == ["forward", "backward", "heatmap", "scaling", "report"]
