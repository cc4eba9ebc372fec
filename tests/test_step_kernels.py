"""The kernels of the training step as compiled for a Hopper GPU, which needs none: vector accesses, no spills, the registers they may have."""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
import contextlib, io, json, tempfile
import torch
torch.cuda.is_available = lambda: True  # or the kernels are those of the interpreter
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lmsys.step import kernels

triton.knobs.cache.dir = tempfile.mkdtemp()
triton.knobs.nvidia.dump_ptxas_log = True
strides = [name for name in kernels._rotate_kernel.arg_names if name.startswith(("stride_", "out_"))]
flat = dict.fromkeys(("masters", "exp_avgs", "exp_avg_sqs", "gradient_scale"), "*fp32")
tables = dict.fromkeys(("gradients", "parameters", "lengths"), "*i64") | dict.fromkeys(("firsts", "slots"), "*i32")
scalars = dict.fromkeys(("decay", "lerp1", "beta2", "lerp2", "step_size", "correction", "eps", "scale", "sign"), "fp32")
types = flat | tables | scalars | dict.fromkeys(("q", "k", "v", "q_out", "k_out", "v_out", "logits"), "*bf16")
types |= {"targets": "*i64", "losses": "*fp32", "cos": "*fp32", "sin": "*fp32"}
types |= dict.fromkeys(("merged", "product", "dproduct", "dmerged", "dy", "x", "beside", "dx"), "*bf16")
types |= dict.fromkeys(("rstd", "gain", "partials", "sums", "matrix"), "*fp32")
cases = {
    "cross_entropy": (32, {"GRADIENT": True, "LANES": 1024, "WIDTH": 8, "STAGES": kernels._LOSS_STAGES}),
    "adamw": (8, {"DTYPE": tl.bfloat16, "MASTER": True, "SCALED": True, "ALIGNED": True, "BLOCK": 2048}),
    "squares": (8, {"DTYPE": tl.bfloat16, "ALIGNED": True, "BLOCK": 2048, "BLOCKS": 4}),
    "rotate": (4, {"D": 64, "D_PAD": 64, "ROWS": 16, "HEADS": 4, "COPY_V": True}),
    "gate": (8, {"F": 2048, "MASKED": False, "ROWS": 1, "COLUMNS": 2048}),
    "gate_back": (8, {"F": 2048, "MASKED": False, "ROWS": 1, "COLUMNS": 2048}),
    "column_sums": (16, {"D": 768, "ROWS": 1024, "COLUMNS": 16}),
    "norm_back": (4, {"D": 768, "D_PAD": 1024, "ROWS": 1, "RSTD": True, "BESIDE": True, "STAGES": 2}),
    "norm_back again": (4, {"D": 768, "D_PAD": 1024, "ROWS": 1, "RSTD": False, "BESIDE": True, "STAGES": 2}),
}
found = {}
for name, (warps, constants) in cases.items():
    kernel = getattr(kernels, f"_{name.split()[0]}_kernel")
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
    divisible = [arg for arg in kernel.arg_names if signature[arg][0] == "*" or arg in (*strides, "row_stride")]
    aligned = {(kernel.arg_names.index(arg),): [["tt.divisibility", 16]] for arg in divisible}
    options = {"norm_back": kernels.NORM_OPTIONS, "cross_entropy": kernels._LOSS_OPTIONS}.get(name.split()[0], {})
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        source = ASTSource(kernel, signature, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options | {"num_warps": warps})
    found[name] = {"ptx": compiled.asm["ptx"], "log": log.getvalue()}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=240, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("kernel", "registers", "loads", "stores"),
    [
        ("cross_entropy", 32, 2, 1),  # two programs of 1,024 threads on an SM, whatever the vocabulary
        ("adamw", 48, 7, 7),  # five programs of 256; fp32 arrays twice a thread, bf16 once
        ("squares", 32, 4, 0),  # eight programs of 256, each with four loads at once
        ("rotate", 48, 14, 12),  # all of a head is under way at once
        ("column_sums", 64, 8, 0),
        ("gate", 32, 2, 1),  # eight programs of 256
        ("gate_back", 40, 3, 3),
        ("norm_back again", 64, 3, 1),  # 1 / rms is made again
        ("norm_back", 64, 6, 1),  # four programs of 256; three loads to shared memory, before the loop and in it
    ],
)
def test_memory_is_accessed_in_vectors_and_nothing_spills(compiled, kernel, registers, loads, stores):
    ptx, log = compiled[kernel]["ptx"], compiled[kernel]["log"]
    assert int(re.search(r"Used (\d+) registers", log)[1]) <= registers
    assert re.findall(r"(\d+) bytes spill stores", log) == ["0"]
    assert len(re.findall(r"ld\.global[.\w]*\.v4\.b32|cp\.async[.\w]* \[[^]]*\], \[[^]]*\], 0x10", ptx)) >= loads
    assert len(re.findall(r"st\.global[.\w]*\.v4\.b32", ptx)) >= stores
