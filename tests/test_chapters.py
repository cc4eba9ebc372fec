"""The chapters on the assignment: their pages, their fills, and the arguments that they make."""

import json
import math
import re
import types

import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmsys import assignment, chapters, cost, records, report
from lmsys.bench import data_parallel, flash, leaderboard, model, model_report, precision, profile, sharding, train_step
from lmsys.config import model_size
from lmsys.model import TransformerLM

REPOSITORY = records.REPOSITORY
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (REPOSITORY / "book" / "chapters").glob("*.md")}
NOT_WORKED = (REPOSITORY / "book" / "what_did_not_work.md").read_text(encoding="utf-8")
MARKER = re.compile(r"<!-- fill: (\w+) -->")
MEASURED = {name for name, fill in chapters.FILLS.items() if fill.__qualname__.startswith("_block")}


@pytest.fixture
def artifacts(tmp_path, monkeypatch):
    """A repository without results; write(machine, name, rows, **stamp) adds some."""
    monkeypatch.setattr(records, "REPOSITORY", tmp_path)

    def write(machine, name, rows, extra=(), **stamp):
        path = tmp_path / "artifacts" / machine / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        empty = dict.fromkeys([*records.SCHEMAS[name], *extra])
        pd.DataFrame([empty | row for row in rows]).to_csv(path, index=False)
        path.with_suffix(".json").write_text(json.dumps({"method": {}, "parameters": {}} | stamp))
        return path.parent

    return write


# --- Pages ----------------------------------------------------------------------------------------


def test_pages_and_fills_belong_together():
    used = {name for text in PAGES.values() for name in MARKER.findall(text)}
    assert used <= set(chapters.FILLS), used - set(chapters.FILLS)
    used |= set(MARKER.findall(NOT_WORKED)) - set(report.FILLS)
    unused = {name for name in chapters.FILLS if not name.startswith("page_")} - used
    assert not unused
    assert not set(chapters.FILLS) & set(report.FILLS)
    toc = (REPOSITORY / "_toc.yml").read_text(encoding="utf-8")
    assert PAGES and all(f"- file: chapters/{name}\n" in toc for name in PAGES)


def test_every_problem_has_its_place():
    """A heading of its name, or the heading under which it is answered; and a question under each of them."""
    under = {
        "leaderboard (attention)": "2025: attention",
        "leaderboard (training step)": "2026: a training step",
        "ddp_overlap_individual_parameters_benchmarking": "ddp_overlap_individual_parameters",
        "ddp_bucketed_benchmarking": "ddp_overlap_bucketed",
    }
    sections = [section for text in PAGES.values() for section in text.split("\n## ")[1:]]
    for problem in assignment.PROBLEMS:
        name = re.escape(under.get(problem.name, problem.name))
        found = [
            section
            for section in sections
            if re.search(rf"(?<!\w){name}(?!\w)", "\n".join(re.findall(r"(?m)\A.*|^### .*", section)))
        ]
        assert len(found) == 1 and "Question.**" in found[0], problem.name


def test_without_results_each_fill_names_what_brings_them(artifacts):
    for name in MEASURED:
        text = report.fill(name)
        assert re.fullmatch(r"\*Not measured yet; [^\n]+\.\*", text), (name, text)
    assert "report profiling --scale full --machine h200`" in report.fill("nsys_profile_a")
    assert "report sharding --scale full --machine h200-x2`" in report.fill("fsdp_gathers")
    assert report.fill("parallelism") == ""
    assert report.fill("page_memory") == "`notebooks/memory.ipynb`"


def test_links_and_figures_are_of_what_is_there(artifacts, tmp_path):
    folder = tmp_path / "artifacts" / "h200"
    folder.mkdir(parents=True)
    (folder / "memory_timeline.png").touch()
    assert report.fill("memory_timeline").startswith(
        "![Live memory through a step, by category](../../artifacts/h200/memory_timeline.png)"
    )
    for machine in ("h200-x4", "h200-x8"):
        (tmp_path / "artifacts" / machine).mkdir()
        (tmp_path / "artifacts" / machine / "sharding_parallelism.png").touch()
    assert report.fill("parallelism").endswith("(../../artifacts/h200-x4/sharding_parallelism.png)")
    executed = tmp_path / "book" / "h200" / "memory.ipynb"
    executed.parent.mkdir(parents=True)
    executed.touch()
    assert report.fill("page_memory") == "[`memory`](../h200/memory.ipynb)"


def test_figures_of_the_committed_results_are_there():
    for name in chapters.FILLS:
        for path in re.findall(r"\]\(\.\./\.\./(artifacts/[^)]+)\)", report.fill(name)):
            assert (REPOSITORY / path).exists(), path


def test_pages_are_read_again_in_every_build(tmp_path):
    for name, text in (("filled", "<!-- fill: bounds -->"), ("plain", "text")):
        (tmp_path / f"{name}.md").write_text(text)
    (tmp_path / "run.ipynb").write_text("<!-- fill: bounds -->")
    events = {}
    app = types.SimpleNamespace(connect=events.__setitem__, add_html_math_renderer=lambda *arguments: None)
    files = {"filled": "filled.md", "plain": "plain.md", "run": "run.ipynb"}
    environment = types.SimpleNamespace(found_docs=set(files), doc2path=lambda name: str(tmp_path / files[name]))
    report.setup(app)
    assert events["env-get-outdated"](app, environment, set(), set(), set()) == ["filled"]
    source = ["a <!-- fill: bounds --> b"]
    events["source-read"](None, "filled", source)
    assert source == [f"a {report.fill('bounds')} b"]


# --- Fills from results ---------------------------------------------------------------------------


def test_the_model_benchmark_reaches_its_pages(artifacts):
    base = {
        "context_length": 512,
        "batch": 4,
        "warmup": 5,
        "status": "ok",
        "samples": 10,
        "kernel": "k",
        "device": "GPU X",
    }
    times = {("fp32", "no"): (20.0, 60.0), ("bf16", "no"): (10.0, 30.0), ("bf16", "blocks"): (8.0, 20.0)}
    rows = [
        base
        | {
            "size": size,
            "dtype": dtype,
            "compiled": compiled,
            "mode": mode,
            "mean_ms": scale * ms,
            "median_ms": scale * ms,
        }
        | {"std_ms": 0.1, "p20_ms": scale * ms - 0.1, "p80_ms": scale * ms + 0.1, "first_ms": 9000.0}
        for size, scale in (("small", 1), ("medium", 3))
        for (dtype, compiled), both in times.items()
        for mode, ms in zip(("forward", "forward_backward"), both, strict=True)
    ]
    folder = artifacts("h200", model.NAME, rows, model.EXTRA_COLUMNS, method={"empty_step_ms": 0.008})
    text = report.fill("benchmarking_script_b")
    assert "| small | 20.00 ± 0.10 |" in text and "| medium | 180.0 ± 0.10 |" in text
    assert "**Forward and backward**, fp32" in text and "Bound by the host" not in text  # no second context
    assert "takes 2.00 to 2.00 times the forward pass" in text  # 60 less 20 over 20, 30 less 10 over 10
    assert "0.1% of the shortest step" in text and "![" not in text
    assert text.count("Not measured yet") == 1  # the second run
    again = [row | {"mean_ms": 1.02 * row["mean_ms"], "median_ms": 1.02 * row["median_ms"]} for row in rows[:2]]
    artifacts("h200", model.REPEAT, again, model.EXTRA_COLUMNS)
    (folder / "model_benchmark_time.png").touch()
    text = report.fill("benchmarking_script_b")
    assert "Not measured" not in text and text.startswith("![")
    assert "medians of 2 points are 1.02 to 1.02 times the first ones; none is further apart than 5%" in text
    again[1] = again[1] | {name: 0.5 * rows[1][name] for name in ("mean_ms", "median_ms", "p20_ms", "p80_ms")}
    artifacts("h200", model.REPEAT, again, model.EXTRA_COLUMNS)
    text = report.fill("benchmarking_script_b")
    assert "further apart than 5% and the spread of both: small, forward and backward, 512 tokens, fp32: 60.0" in text

    assert "small 2.00, medium 2.00" in report.fill("mixed_precision_speed")
    assert "That gain grows with each size, from 2.00 to 2.00." in report.fill("mixed_precision_speed")
    slower = [
        row | {"mean_ms": 3 * row["mean_ms"]} if row["size"] == "medium" and row["dtype"] == "bf16" else row
        for row in rows
    ]
    tf32 = [row | {"dtype": "tf32", "mean_ms": 15.0} for row in rows[1:2]]
    artifacts("h200", model.NAME, slower + tf32, model.EXTRA_COLUMNS, method={"empty_step_ms": 0.008})
    text = report.fill("mixed_precision_speed")
    assert "That gain does not grow with each size, from 2.00 to 0.67." in text
    assert "Times as fast as in tf32, which casts nothing: small 0.50." in text
    assert "- Compiled (blocks), forward and backward: 1.50" in report.fill("torch_compile_b")

    artifacts(
        "h200",
        "model_benchmark_warmup",
        [rows[1] | {"step": i, "time_ms": ms} for i, ms in enumerate((900.0, 12.0, *[10.0] * 13))],
        parameters={"steps": 10},
    )
    calls = {"first_calls": 1, "later_calls": 1}
    artifacts("h200", "model_benchmark_first_step", [{"name": "load", "first_ms": 800.0, "later_ms": 0.0} | calls])
    text = report.fill("benchmarking_script_c")
    assert "takes 900 ms; the second takes 12.0 ms and the later ones 10.0 ms" in text
    assert "| 0 | 99.20" in text and "`load`" in text and "Not measured" not in text
    assert "+2.0% after 1, less than the standard deviation there, +0.0% after 2" in text


def test_points_bound_by_the_host_are_named(artifacts):
    """12, 13 and 26 ms at 128, 256 and 512 tokens: the first hardly grows, the second doubles, the third has no longer one beside it."""
    base = {"size": "small", "batch": 4, "dtype": "bf16", "compiled": "no", "warmup": 5, "status": "ok", "samples": 10}
    base |= {"kernel": "k", "device": "GPU X"}
    rows = [
        base | {"context_length": n, "mode": mode, "mean_ms": ms, "median_ms": ms, "std_ms": std * ms}
        for mode in ("forward", "full_step")
        for n, ms, std in ((128, 12.0, 0.2), (256, 13.0, 0.01), (512, 26.0, 0.01))
    ]
    trouble = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. See documentation."
    rows.append(base | {"context_length": 1024, "mode": "forward", "status": "oom", "note": trouble})
    folder = artifacts("h200", model.NAME, rows, model.EXTRA_COLUMNS, method={"empty_step_ms": 0.008})
    frame = records.read_results(folder / f"{model.NAME}.csv")
    (said,) = model_report.host_said(frame[frame.status == "ok"])
    assert said.startswith(
        "Bound by the host, eager: 1 of 2 points (small up to 128 tokens); their standard deviation is 20.0% of the mean"
    )
    assert "that of the others 1.0%" in said and f"- {said}" in report.fill("benchmarking_script_b")
    assert model_report.conclusions(frame)[-1] == (
        "1 point oom, the first small at 1,024 tokens, bf16, forward: OutOfMemoryError: CUDA out of memory."
    )
    assert "| oom |" in report.fill("benchmarking_script_b")
    rows[0]["mean_ms"] = 6.0  # now every point grows with its tokens
    artifacts("h200", model.NAME, rows, model.EXTRA_COLUMNS, method={"empty_step_ms": 0.008})
    assert "Bound by the host" not in report.fill("benchmarking_script_b")


def test_kernels_without_an_operator_count_by_their_name(artifacts):
    point = {
        "size": "tiny",
        "context_length": 64,
        "batch": 2,
        "dtype": "fp32",
        "phase": "forward",
        "part": "feed-forward",
    }
    kernel = point | {"mode": "inference", "name": "gemm", "count": 3}
    rows = [
        kernel | {"operator": "aten::mm", "category": profile.MATMUL, "total_ms": 5.0},
        kernel | {"operator": "Command Buffer Full", "category": profile.OTHER, "total_ms": 3.0},
        kernel | {"name": "add", "operator": "aten::add", "category": "element-wise", "total_ms": 2.0},
        kernel | {"name": "odd", "operator": "aten::view", "category": profile.OTHER, "total_ms": 0.1},
    ]
    artifacts("h200", profile.KERNELS, rows)
    artifacts("h200", profile.NAME, [point | {"mode": "inference", "status": "ok"}], profile.EXTRA_COLUMNS)
    text = report.fill("nsys_profile_c")
    assert "| tiny | 64 | fp32 | 79.2% | 19.8% | 1.0% |" in text  # of 10.1 ms
    assert "no operator for 3 kernels (tiny, 64 tokens, fp32)" in text
    artifacts("h200", profile.KERNELS, [row for row in rows if row["operator"] != "Command Buffer Full"])
    assert "no operator" not in report.fill("nsys_profile_c")
    nested = "void at::native::unrolled<at::native::direct_copy(at::Base&)::{lambda(float)#1}, 4>(int, float)"
    assert profile.short_name(nested) == "unrolled<direct_copy>"  # cut at the first argument, and closed


def test_options_that_cost_time_are_what_did_not_work(artifacts):
    base = {"size": "gpt2", "context_length": 1024, "local_batch": 32, "dtype": "bf16", "status": "ok", "samples": 15}
    base |= {"implementation": "lmsys", "tokens_per_s": 4e5, "peak_mib": 16e3, "device": "GPU X"}
    rows = [
        base | {"option": name, "step_ms": ms}
        for name, ms in (("all", 70.0), ("fused_loss", 74.0), ("merged_gate", 68.0))
    ]
    artifacts("h200", train_step.NAME, rows, ("host_ms", "device"))
    losses = [
        {"size": "gpt2", "implementation": "lmsys", "option": row["option"], "step": 0, "loss": 9.0} for row in rows
    ]
    artifacts("h200", train_step.LOSSES, losses)
    text = report.fill("costly_options")
    assert "`merged_gate` costs 2.00 ms" in text and "fused_loss" not in text


def test_whether_nesting_lowers_the_peak(artifacts):
    base = {"size": "tiny", "batch": 1, "context_length": 8, "dtype": "fp32", "kernel": "k", "status": "ok"}
    rows = [
        base | {"strategy": name, "peak_mib": mib} for name, mib in (("none", 900.0), ("1", 500.0), ("nested", 499.0))
    ]
    artifacts("h200", "memory_checkpointing", rows)
    assert chapters._nested_peak().startswith("- Nesting does not lower the peak here (499 MiB, without it 500)")
    artifacts("h200", "memory_checkpointing", [*rows[:2], rows[2] | {"peak_mib": 300.0}])
    assert chapters._nested_peak() == ""


def test_the_profile_and_precision_reach_their_pages(artifacts, tmp_path):
    folder = tmp_path / "artifacts" / "h200"
    profile.run(profile.settings("smoke", contexts=[8], device="cpu"), folder)
    precision.run(precision.settings("smoke"), folder)
    for letter in "abcde":
        text = report.fill(f"nsys_profile_{letter}")
        assert "tiny, 8 tokens, fp32" in text and "| tiny | 8 | fp32 |" in text and "Not measured" not in text
    for name in ("sums", "dtypes", "layer_norm"):
        text = report.fill(f"mixed_precision_{name}")
        assert "| --- |" in text and "\n- " in text and "Not measured" not in text


def _replica(**more):
    row = {
        "gpus": 2,
        "size": "xl",
        "context_length": 512,
        "local_batch": 4,
        "dtype": "bf16",
        "status": "ok",
        "samples": 15,
    }
    row |= {
        "step_ms": 200.0,
        "p20_ms": 199.0,
        "p80_ms": 201.0,
        "tokens_per_s": 1e4,
        "exposed_comm_ms": 50.0,
        "peak_mib": 4e4,
    }
    return row | {"device": "GPU X", "scaling_efficiency": 0.9, "final_loss": 9.0} | more


def test_data_parallel_results_reach_their_page(artifacts):
    one = {"study": "wrappers", "wrapper": "none", "gpus": 1, "step_ms": 150.0, "exposed_comm_ms": 0.0}
    rows = [_replica(**one)]
    rows += [
        _replica(
            study="wrappers",
            wrapper=name,
            step_ms=ms,
            exposed_comm_ms=ms - 150,
            traced_comm_ms=40.0,
            traced_hidden_ms=hidden,
        )
        for name, ms, hidden in (
            ("naive", 200.0, 0.0),
            ("flat", 190.0, 0.0),
            ("overlap", 165.0, 30.0),
            ("flashddp", 155.0, 38.0),
        )
    ]
    rows.append(_replica(study="wrappers", wrapper="torch_ddp", status="error", note="it broke", step_ms=None))
    rows += [
        _replica(study="buckets", wrapper="flashddp", bucket_mb=mb, step_ms=ms)
        for mb, ms in ((1.0, 170.0), (25.0, 155.0))
    ]
    rows.append(_replica(study="scaling", wrapper="flashddp", scaling_efficiency=0.97))
    rows.append(
        _replica(study="scaling", wrapper="flashddp", scaling_efficiency=0.91)
        | {"options": "transport=copy_engine", "exposed_comm_ms": 60.0}
    )
    artifacts("h200-x2", data_parallel.NAME, rows, data_parallel.EXTRA_COLUMNS)
    link = cost.Link(2e-5, 3e11)
    times = [
        {
            "backend": "nccl",
            "op": "all_reduce",
            "gpus": 2,
            "size_mib": mib,
            "status": "ok",
            "samples": 5,
            "device": "GPU X",
        }
        | {"median_ms": 1e3 * link.seconds("all_reduce", mib * 2**20, 2), "busbw_gb_s": 300.0}
        for mib in (1, 10, 100, 1000)
    ]
    artifacts("h200-x2", "collectives_results", times, ("device", "note"))

    assert "on GPU X:" in report.fill("wrappers") and "| `torch_ddp` | 2 | error |" in report.fill("wrappers")
    assert report.fill("naive_ddp").startswith("- naive: 200 ms a step, of which communication adds 50.00 ms (25.0%)")
    assert report.fill("flat_ddp").startswith("- flat: 190 ms")
    assert "75.0% of the time of communication lies beside computation" in report.fill("overlap_ddp")
    text = report.fill("bucketed_ddp")
    assert "fastest bucket size is 25 MB" in text and "1.290 times the speed of naive's" in text and "it broke" in text
    text = report.fill("scaling")
    assert "flashddp on 2 GPUs: 97.0%" in text and "flashddp with transport=copy_engine on 2 GPUs: 91.0%" in text
    assert "| `flashddp` | 2 |" in text and "| `flashddp` transport=copy_engine | 2 |" in text
    alone = {"wrapper": "none", "gpus": 1, "scaling_efficiency": 1.0}
    rows += [
        _replica(study="captured", **alone, step_ms=96.0),
        _replica(study="captured", **alone, step_ms=74.0) | {"options": "captured=True"},
        _replica(study="captured", wrapper="torch_ddp", step_ms=94.0, scaling_efficiency=0.78)
        | {"options": "captured=True"},
        _replica(study="captured", wrapper="flashddp", step_ms=80.0, scaling_efficiency=0.92)
        | {"options": "captured=True transport=copy_engine"},
    ]
    artifacts("h200-x2", data_parallel.NAME, rows, data_parallel.EXTRA_COLUMNS)
    assert "as one CUDA graph, on GPU X:" in report.fill("wrappers") and "| 94.0 [199, 201] |" in report.fill(
        "wrappers"
    )
    text = report.fill("captured")
    assert "one GPU: 96.0 ms a step, 74.0 ms as one graph" in text
    assert (
        "2 GPUs: flashddp with transport=copy_engine is the fastest, 80.0 ms a step and 92.0% of linear scaling" in text
    )
    assert "torch_ddp 94.0 ms a step and 78.0% of linear scaling, 1.175 times as long" in text
    assert report.fill("captured_headline") == ""  # of the machine whose LM matrix is on the front page
    artifacts("h200-x2", "lm_matrix_results", [])
    assert "torch_ddp 94.0 ms" in report.fill("captured_headline")
    assert "300 GB/s of bus bandwidth" in report.fill("collectives")
    size = 4.0 * cost.model_parameters(model_size("xl"))
    best = cost.best_bucket_bytes(size, 3e11, 2e-5)  # of two ranks, bus and algorithm bandwidth are one
    assert f"sqrt(s w o) = {best / 1e6:.3g} MB" in report.fill("bucket_model")
    assert all(
        "Not measured" not in report.fill(name) for name in ("wrappers", "collectives", "bucket_model", "scaling")
    )


def test_sharding_results_reach_their_page(artifacts):
    rows = [_replica(sharding=name, wrapper=name, step_ms=ms) for name, ms in (("replicated", 200.0), ("zero1", 210.0))]
    rows += [
        _replica(sharding=name, wrapper=name, step_ms=ms, traced_comm_ms=50.0, traced_hidden_ms=45.0)
        for name, ms in (("fsdp", 220.0), ("torch_fsdp2", 240.0))
    ]
    artifacts("h200-x2", sharding.NAME, rows, sharding.EXTRA_COLUMNS)
    config = model_size("xl")
    memory = []
    for name, formula in (("replicated", "replicated"), ("zero1", "zero1"), ("fsdp", "fsdp")):
        at = cost.memory_at(config, formula, 2)
        points = {point: size / 2**20 for point, size in at.items()}
        points[sharding.PEAK] = points[cost.MEMORY_POINTS[-1]] + 1000
        memory += [
            {
                "sharding": name,
                "wrapper": name,
                "gpus": 2,
                "size": "xl",
                "point": point,
                "status": "ok",
                "device": "GPU X",
            }
            | {"measured_mib": mib, "predicted_mib": mib}
            for point, mib in points.items()
        ]
    artifacts("h200-x2", sharding.MEMORY, memory, ("device",))
    lanes = [("phase", "forward", 0, 100), ("communication", "gather", 0, 20), ("compute", "product", 15, 85)]
    keys = ("wrapper", "lane", "name", "start_ms", "duration_ms")
    artifacts("h200-x2", sharding.TIMELINE, [dict(zip(keys, ("fsdp", *lane), strict=True)) for lane in lanes])

    text = report.fill("sharding_memory")
    assert "The first step of zero1's optimizer adds 50.0% of what the whole one adds" in text and "fsdp on" not in text
    assert "a step of zero1 takes 1.050 times as long as one of replicated" in report.fill("sharding_speed")
    text = report.fill("fsdp_memory")
    assert "fsdp on 2 GPUs takes" in text and "a step of fsdp takes 0.917 times as long as one of torch_fsdp2" in text
    assert "90.0% of it beside computation" in text and "zero1" not in text
    assert "15.0 ms have no computation beside them" in report.fill("fsdp_gathers")


def test_boards_reach_their_page(artifacts):
    base = {
        "gpus": 2,
        "status": "ok",
        "samples": 5,
        "mfu": 0.4,
        "peak_mib": 44e3,
        "device": "NVIDIA H200",
        "dtype": "bf16",
    }
    step = {
        "board": "2026",
        "batch": 2,
        "seq_len": 32768,
        "tokens_per_s": 11e3,
        "loss": 11.9,
        "plan": "p",
        "rates": "r",
    }
    step |= {
        "predicted_ms": 5400.0,
        "predicted_peak_mib": 50e3,
        "error": 1e-3,
        "error_pytorch": 2e-3,
        "elapsed_s": 60.0,
    }
    rows = [
        base | step | {"implementation": name, "median_ms": ms, "p20_ms": ms, "p80_ms": ms}
        for name, ms in (("torch_native", 5940.0), ("lmsys", 5500.0))
    ]
    artifacts("h200-x2", leaderboard.NAME, rows, leaderboard.EXTRA_COLUMNS)
    text = report.fill("board_2026")
    assert text.index("| `lmsys` | ours | 5,500 [5,500, 5,500] |") < text.index("`torch_native`")
    assert "takes **5,500 ms** on 2 x NVIDIA H200, an MFU of 40.0%" in text and "5,940 ms: 1.08 times ours" in text
    assert "Not measured yet" in report.fill("board_2025")
    shape = {"batch": 1, "heads": 16, "seq_len": 16384, "head_dim": 64, "compiled": True, "gpus": 1}
    row = base | shape | {"board": "2025", "implementation": "flash_attention_triton", "median_ms": 4.0, "p20_ms": 3.9}
    row |= {"p80_ms": 4.1, "bare_ms": 3.8, "tflops": 481.0}
    artifacts("h200", leaderboard.NAME, [row], leaderboard.EXTRA_COLUMNS)
    flops = 3.5 * 4 * 16 * 64 * 16384**2 / 2
    assert f"{flops / 1e12:.2f} TFLOP, {1e3 * flops / 989.5e12:.2f} ms" in report.fill("board_2025")
    d, f, layers, vocabulary, length = 4096, 11008, 34, 151936, 32768
    parameters = layers * (4 * d * d + 3 * d * f + 2 * d) + d + 2 * vocabulary * d
    flops = 2 * length * (6 * (parameters - vocabulary * d) + 6 * layers * d * length)
    text = report.fill("board_2026_floor")
    assert f"{parameters / 1e9:.2f} billion parameters" in text and f"{flops / 2 / 989.5e12:.2f} s on 2 H200s" in text


def test_attention_fills_by_hand(artifacts):
    base = {
        "batch": 8,
        "seq_len": 1024,
        "head_dim": 64,
        "dtype": "fp32",
        "causal": True,
        "status": "ok",
        "samples": 100,
    }
    extra = ("error", "error_pytorch", "device", "note")
    rows = []
    for name, ms, held in (("naive", 2.0, 110.0), ("compiled", 1.0, 110.0), ("flash", 0.5, 60.0)):
        formula = flash.before_backward_bytes(name, 8, 1024, 64, 4) / 2**20
        rows += [
            base
            | {
                "implementation": name,
                "pass": which,
                "median_ms": ms,
                "p20_ms": ms,
                "p80_ms": ms,
                "computed_mib": formula,
            }
            | {"before_backward_mib": formula + 64.0, "tflops": 1.0, "peak_mib": held}
            for which in ("forward", "backward", "forward_backward")
        ]
    artifacts("h200", "pytorch_attention_results", rows, extra)
    text = report.fill("pytorch_attention")
    assert (
        "Over all points 64 to 64 MiB are there beside what the formula counts, the same for every implementation"
        in text
    )
    exact = [row | {"before_backward_mib": row["computed_mib"]} for row in rows]
    artifacts("h200", "pytorch_attention_results", exact, extra)
    assert "At no point of any implementation are the two a MiB apart." in report.fill("pytorch_attention")
    text = report.fill("torch_compile_a")
    assert "| 64 | 1,024 | 2.00 | 1.00 | 2.00 | 1.00 |" in text and "forward: 2.00 times the speed" in text

    step = base | {"heads": 1, "batch": 4, "dtype": "bf16", "pass": "forward", "median_ms": 1.0, "counted_mib": None}
    steps = [
        step | {"step": name, "counted_mib": flash.step_bytes(flash.STEPS[name], 4, 1, 1024, 64, 2) / 2**20}
        for name in ("naive", "portable Triton")
    ]
    artifacts("h200", "flash_steps_results", steps, ("counted_mib", "error", "error_pytorch", "device", "note"))
    ceilings = [{"what": "copy", "rate": 4000.0, "status": "ok"}, {"what": "product", "rate": 800.0, "status": "ok"}]
    artifacts("h200", "ceilings_results", ceilings, ("device",))
    found = {name: flops for name, _, flops, _ in chapters.intensities()}
    assert found["portable Triton"] == pytest.approx(1024 / (2 * 2))  # T / (2 s), as the page says
    assert found["naive"] == pytest.approx(2 * 64 / (8 * 2), rel=0.05)  # 2 D / (8 s), and q, k, v, o beside it
    assert "The device does 200 FLOPs" in report.fill("attention_intensity")


# --- The arguments --------------------------------------------------------------------------------


def test_what_a_block_keeps():
    """The table of the page, the formula of cost, and the measured bytes agree."""
    batch, length, dtype = 4, 2048, "bf16"
    config = model_size("2.7b", context_length=length)
    d, f, heads, width, e = config.d_model, config.d_ff, config.num_heads, config.head_dim, 2
    tokens = batch * length
    kept = 8 * tokens * d + 8 * tokens * (d + 1) + 3 * e * tokens * d + 4 * length * width + 4 * e * tokens * f
    weights = 2 * (4 * d * d + 3 * d * f)
    fused = 6 * e * tokens * d + 4 * tokens * heads
    plain = 4 * e * tokens * d + (e + 4) * batch * heads * length**2 + length**2
    by_cost = cost.block_residuals(config, batch, length, dtype, scores=False)
    assert sum(by_cost.values()) == kept + weights + fused
    by_cost = cost.block_residuals(config, batch, length, dtype, scores=True, fp32_softmax=True)
    assert sum(by_cost.values()) == kept + weights + plain
    frame = records.read_results(REPOSITORY / "artifacts" / "h200" / "memory_residuals.csv")
    measured = frame[(frame.what == "block") & (frame.status == "ok")].mib.sum()
    assert measured == pytest.approx((kept + weights + fused) / 2**20, rel=0.01)


@pytest.mark.parametrize("blocks", [8, 32])
def test_nested_checkpoints(blocks):
    """N + N / 2 (1 + log2 N) block forwards; one input a level at the most."""
    plan, levels = cost.Checkpointing(blocks, 1, nested=True), math.log2(blocks)
    assert plan.forwards() == blocks + blocks / 2 * (1 + levels)
    assert max(inputs for inputs, _ in plan.backward()) == 1 + levels
    assert max(kept for _, kept in plan.backward()) == 1


def test_groups_of_blocks():
    """sqrt(N c / r) is where N c / k + k r is least."""
    blocks, stream, residuals = 32, 80.0, 300.0
    best = chapters.group_size(blocks, stream, residuals)

    def held(k):
        return blocks / k * stream + k * residuals

    assert held(best) < min(held(0.99 * best), held(1.01 * best))


@pytest.mark.parametrize("dtype,stops", [(torch.bfloat16, 4), (torch.float16, 32)])
def test_where_a_sum_stands_still(dtype, stops):
    """An addend below half of the spacing u(s) is lost: at 4 in bf16, at 32 in fp16."""
    significant = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    spacing = 2.0 ** (math.floor(math.log2(stops)) - (significant - 1))
    assert spacing / 4 < 0.01 < spacing / 2  # and not at half of it
    total, addend = torch.zeros((), dtype=dtype), torch.tensor(0.01, dtype=dtype)
    for _ in range(20000):
        if total + addend == total:
            break
        total = total + addend
    assert total.item() == stops


def test_products_of_a_forward_pass():
    """5 L + 1 with a weight, 2 L in attention."""
    config = model_size("tiny", vocab_size=64, context_length=8)
    net = TransformerLM(config, attention_kernel="scaled_dot_prod_attention")
    seen = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function._schema.name)
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Count():
        net(torch.zeros(2, 8, dtype=torch.long))
    assert seen.count("aten::mm") == 5 * config.num_layers + 1
    assert seen.count("aten::bmm") == 2 * config.num_layers


def test_softmax_and_products_by_flops():
    """5 / (4 D) for each score."""
    heads, length, width = 4, 128, 64
    products = cost.attention_flops(1, heads, length, length, width, False, "forward")
    assert 5 * heads * length**2 / products == pytest.approx(5 / (4 * width))


def test_the_forward_pass_in_tiles_and_the_backward_pass_from_l():
    """The recurrences and the gradients that the page gives, against autograd in float64."""
    torch.manual_seed(0)
    length, width, tile = 12, 4, 4
    q, k, v, d_out = torch.randn(4, length, width, dtype=torch.float64)
    for t in (q, k, v):
        t.requires_grad_()
    expected = torch.softmax(q @ k.T / math.sqrt(width), -1) @ v
    expected.backward(d_out)
    with torch.no_grad():
        m, total, out = (
            torch.full((length, 1), -math.inf).double(),
            torch.zeros(length, 1).double(),
            torch.zeros_like(q),
        )
        for j in range(0, length, tile):
            s = q @ k[j : j + tile].T / math.sqrt(width)
            new = torch.maximum(m, s.amax(-1, keepdim=True))
            p = torch.exp(s - new)
            total = torch.exp(m - new) * total + p.sum(-1, keepdim=True)
            out = torch.exp(m - new) * out + p @ v[j : j + tile]
            m = new
        torch.testing.assert_close(out / total, expected)
        lse = m + total.log()
        p = torch.exp(q @ k.T / math.sqrt(width) - lse)
        delta = (d_out * expected).sum(-1, keepdim=True)
        torch.testing.assert_close(delta, (p * (d_out @ v.T)).sum(-1, keepdim=True))
        d_s = p * (d_out @ v.T - delta)
        for found, t in ((p.T @ d_out, v), (d_s @ k / math.sqrt(width), q), (d_s.T @ q / math.sqrt(width), k)):
            torch.testing.assert_close(found, t.grad)


def test_the_backward_pass_of_tensor_parallelism():
    """Each device's slices from its own z, and dx as the sum over devices, against autograd on the whole layer."""
    torch.manual_seed(0)
    tokens, d, f, devices = 5, 6, 8, 2
    x, dy = torch.randn(2, tokens, d, dtype=torch.float64)
    w1, w2 = torch.randn(2, d, f, dtype=torch.float64)
    w3 = torch.randn(f, d, dtype=torch.float64)
    for t in (x, w1, w2, w3):
        t.requires_grad_()
    silu = torch.nn.functional.silu
    ((silu(x @ w1) * (x @ w2)) @ w3).backward(dy)
    dx, parts = 0, ([], [], [])
    for i in range(devices):
        part = slice(i * f // devices, (i + 1) * f // devices)
        a, b, c = w1.detach()[:, part], w2.detach()[:, part], w3.detach()[part]
        x1, x2 = (x.detach() @ w for w in (a, b))
        dz, sigmoid = dy @ c.T, torch.sigmoid(x1)
        dx2 = dz * silu(x1)
        dx1 = dz * x2 * sigmoid * (1 + x1 * (1 - sigmoid))
        dx = dx + dx1 @ a.T + dx2 @ b.T
        for kept, grad in zip(parts, (x.detach().T @ dx1, x.detach().T @ dx2, (silu(x1) * x2).T @ dy), strict=True):
            kept.append(grad)
    torch.testing.assert_close(dx, x.grad)
    for kept, weight, dim in zip(parts, (w1, w2, w3), (1, 1, 0), strict=True):
        torch.testing.assert_close(torch.cat(kept, dim), weight.grad)


def test_times_and_bounds_of_the_strategies():
    """The formulas of the page against lmsys.cost, at two points."""
    b, n, nf, nt = 2**18, 16, 8, 2
    layer, tpu = cost.FeedForward(4096, 11008), cost.TPU_V5P
    d, f, c, w = layer.d_model, layer.d_ff, tpu.flops, tpu.bandwidth
    assert layer.compute_s(b, n, tpu) == pytest.approx(6 * b * d * f / (n * c))
    assert layer.compute_s(b, n, tpu, "backward") == pytest.approx(12 * b * d * f / (n * c))
    assert layer.weights_s(n, 1, tpu) == pytest.approx(6 * d * f * (n - 1) / (n * w))
    assert layer.weights_s(n, 1, tpu, "backward") == pytest.approx(12 * d * f * (n - 1) / (n * w))
    assert layer.activations_s(b, 1, n, tpu) == pytest.approx(4 * b * d * (n - 1) / (n * w))
    assert layer.weights_s(nf, nt, tpu) == pytest.approx(6 * d * f * (nf - 1) / (nf * nt * w))
    assert layer.activations_s(b, nf, nt, tpu) == pytest.approx(4 * b * d * (nt - 1) / (nf * nt * w))
    data, tensor = 1 + b * w / c, 1 + 3 * f * w / (2 * c)
    assert layer.most_data_parallel(b, tpu) == pytest.approx(data)
    assert layer.most_tensor(tpu) == pytest.approx(tensor)
    assert layer.most_tensor(tpu, "backward") == pytest.approx(1 + 3 * f * w / c)
    assert layer.most_mixed(b, tpu) == pytest.approx(data * tensor)
    in_turn = (3 * b * f * w / c + 3 * f + 2 * b) ** 2 / (24 * b * f)
    assert layer.most_mixed(b, tpu, overlapped=False) == pytest.approx(in_turn)


def test_sums_of_the_page_on_sharding():
    """Elements sent, bytes a parameter, the batch at which a block's gather hides, and communication_accounting's terms."""
    n, elements = 8, 1e9
    all_reduce, one = cost.bus_factor("all_reduce", n), cost.bus_factor("all_gather", n)
    assert (all_reduce, one) == (2 * (n - 1) / n, (n - 1) / n) and cost.bus_factor("reduce_scatter", n) == one
    tokens = cost.TPU_V5P.intensity * (n - 1) / n
    gather = cost.Link(0.0, cost.TPU_V5P.bandwidth).seconds("all_gather", 2 * elements, n)
    assert gather == pytest.approx(2 * elements * tokens / cost.TPU_V5P.flops)
    d, f = cost.XXL.d_model, cost.XXL.d_ff
    assert cost.XXL.state_bytes == 16 * 2 * d * f * 126 and cost.XXL.activation_bytes(1) == 2 * (d + f) * 126
    assert cost.XXL.tokens_per_device(16, 4, cost.TPU_V5P, 2) == pytest.approx(cost.TPU_V5P.intensity / (2 * 4))
    lines = {line.split(" | ")[0].strip("| "): line for line in report.fill("sharding_state").splitlines()}
    assert "4.00, 4.00, 4.00 | 12.0 | 4.00, 4.00, 1.00 | 9.00" in lines["zero1"]
    assert "4.00, 2.00, 4.00 | 10.0" in lines["zero2"] and "| 16.0 |" in lines["replicated"]


def test_the_bucket_formula():
    """n = sqrt(s / (w o)) leaves 2 sqrt(s o / w) seconds."""
    s, w, o = 8e9, 3e11, 2e-5
    n = s / cost.best_bucket_bytes(s, w, o)
    assert n == pytest.approx(math.sqrt(s / (w * o)))
    assert cost.ddp_overhead(s, w, o, n) == pytest.approx(2 * math.sqrt(s * o / w))
