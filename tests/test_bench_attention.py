import math

import pytest
import torch

from lmsys import attention as kernels
from lmsys import cost, plots
from lmsys.attention.reference import reference_attention
from lmsys.bench import attention
from lmsys.records import REPOSITORY, SCHEMAS, read_results


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
    written = {path.name for path in attention.write_report(frame, folder)}
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


def test_a_wrong_kernel_is_an_error_row_and_not_a_time(monkeypatch):
    """The check before the clock: a kernel that forgets the mask is caught, in the forward and in the backward pass."""
    sweep = attention.settings("smoke", kernels=["vectorized_torch"], custom_tiers=["32:32"], device="cpu")

    def unmasked(q, k, v, *, causal, kernel):
        return reference_attention(q, k, v, causal=False)[0]

    monkeypatch.setattr(attention, "attention", unmasked)
    (row,) = attention.rows(sweep, torch.device("cpu"))
    assert row["status"] == "error" and "wrong" in row["note"] and "median_ms" not in row


def test_out_of_memory_is_a_row_and_the_sweep_goes_on(monkeypatch):
    sweep = attention.settings(
        "smoke", kernels=["vectorized_torch", "flash_attention_torch"], custom_tiers=["32:32"], device="cpu"
    )
    monkeypatch.setattr(attention, "_available_bytes", lambda: 1000)
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
