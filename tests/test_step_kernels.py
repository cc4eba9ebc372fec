"""The kernels of the training step as compiled for a Hopper GPU, which needs none.

Vector accesses, no spills, the registers they may have.
"""

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
from lmsys.step import adamw, gate, loss, norm, rope

triton.knobs.cache.dir = tempfile.mkdtemp()
triton.knobs.nvidia.dump_ptxas_log = True
strides = [name for name in rope._rotate_kernel.arg_names if name.startswith(("stride_", "out_"))]
flat = dict.fromkeys(("exp_avgs", "exp_avg_sqs", "gradient_scale"), "*fp32")
tables = dict.fromkeys(("gradients", "parameters", "lengths"), "*i64") | dict.fromkeys(("firsts", "slots"), "*i32")
scalars = dict.fromkeys(("decay", "lerp1", "beta2", "lerp2", "step_size", "correction", "eps", "scale", "sign"), "fp32")
types = flat | tables | scalars | dict.fromkeys(("q", "k", "v", "q_out", "k_out", "v_out", "logits"), "*bf16")
types |= {"targets": "*i64", "losses": "*fp32", "cos": "*fp32", "sin": "*fp32"}
types |= dict.fromkeys(("gate", "up", "dgate", "dup", "product", "dproduct"), "*bf16")
types |= dict.fromkeys(("dy", "x", "y", "added", "total", "residual", "dx"), "*bf16")
types |= dict.fromkeys(("gain", "partials", "sums", "matrix"), "*fp32")
tile = {"F": 2048, "STRIDE": 4096, "MASKED": False, "ROWS": 1, "COLUMNS": 2048}
cases = {
    "cross_entropy": (loss, 32, {"GRADIENT": True, "LANES": 1024, "WIDTH": 8, "STAGES": loss._STAGES}),
    "adamw": (adamw, 8, {"SCALED": True, "ALIGNED": True, "BLOCK": 2048}),
    "squares": (adamw, 8, {"ALIGNED": True, "BLOCK": 2048, "BLOCKS": 4}),
    "rotate": (rope, 4, {"D": 64, "D_PAD": 64, "ROWS": 16, "HEADS": 4, "COPY_V": True}),
    "swiglu": (gate, 8, tile),
    "swiglu_back": (gate, 8, tile),
    "rms_norm": (norm, 4, {"ADD": True, "D_PAD": 1024, "ROWS": 2}),
    "column_sums": (norm, 16, {"D": 768, "ROWS": 1024, "COLUMNS": 16}),
    "norm_back": (norm, 4, {"D": 768, "D_PAD": 1024, "ROWS": 1, "RESIDUAL": True, "STAGES": 2}),
}
found = {}
for name, (module, warps, constants) in cases.items():
    kernel = getattr(module, f"_{name}_kernel")
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
    divisible = [arg for arg in kernel.arg_names if signature[arg][0] == "*" or arg in (*strides, "row_stride", "d")]
    aligned = {(kernel.arg_names.index(arg),): [["tt.divisibility", 16]] for arg in divisible}
    options = module.OPTIONS if name in ("norm_back", "cross_entropy") else {}
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
        ("adamw", 48, 8, 6),  # five programs of 256; four fp32 arrays twice a thread
        ("squares", 48, 8, 0),  # with eight loads at once
        ("rotate", 48, 14, 12),  # all of a head is under way at once
        ("column_sums", 64, 8, 0),
        ("swiglu", 32, 2, 1),  # eight programs of 256
        ("swiglu_back", 40, 3, 3),
        ("rms_norm", 48, 4, 4),
        ("norm_back", 64, 3, 1),  # four programs of 256; 1 / rms is recomputed
    ],
)
def test_memory_is_accessed_in_vectors_and_nothing_spills(compiled, kernel, registers, loads, stores):
    ptx, log = compiled[kernel]["ptx"], compiled[kernel]["log"]
    assert int(re.search(r"Used (\d+) registers", log)[1]) <= registers
    assert re.findall(r"(\d+) bytes spill stores", log) == ["0"]
    assert len(re.findall(r"ld\.global[.\w]*\.v4\.b32|cp\.async[.\w]* \[[^]]*\], \[[^]]*\], 0x10", ptx)) >= loads
    assert len(re.findall(r"st\.global[.\w]*\.v4\.b32", ptx)) >= stores
