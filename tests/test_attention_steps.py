"""The kernels of the intermediate steps.

In Triton's interpreter where there is no GPU, on the GPU where there is one.
"""

import os
import subprocess
import sys

import pytest
import torch
from attention_cases import CASES, FLOOR, inputs

from lmsys.attention.reference import reference_attention

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

pytest.importorskip("triton")
pytestmark = [pytest.mark.filterwarnings(f"ignore:{what}") for what in ("no CUDA GPU", "All-NaN slice")]


def check(forward, q, k, v, causal):
    """o and lse against float64: no more than twice PyTorch's error in the same dtype, and the floor."""
    o, lse = forward(q, k, v, causal)
    plain, _ = reference_attention(q, k, v, causal=causal)
    exact, exact_lse = reference_attention(q.double(), k.double(), v.double(), causal=causal)
    assert o.shape == q.shape and o.dtype == q.dtype
    assert (o - exact).abs().max() <= 2 * (plain - exact).abs().max() + FLOOR[q.dtype]
    assert (lse - exact_lse).abs().max() <= 2e-3


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tma(case, causal):
    from lmsys.attention import flash_steps

    q, k, v, _ = inputs(*case, device=DEVICE)
    reason = flash_steps.no_tma(DEVICE, q.dtype, q.shape[3])
    if reason:
        pytest.skip(reason)
    check(flash_steps.tma_forward, q, k, v, causal)


def test_tma_takes_strides_and_no_tile_reaches_into_the_next_head():
    from lmsys.attention import flash_steps

    q, k, v = torch.randn(2, 45, 3, 2, 16, device=DEVICE).permute(2, 0, 3, 1, 4).unbind(0)
    k[0, 1:] = float("nan")  # the head after the first
    o, _ = flash_steps.tma_forward(q, k, v, False)
    assert o[0, 0].isfinite().all() and o[0, 1].isnan().all()


@pytest.mark.skipif(ON_GPU, reason="about machines without a GPU")
def test_what_is_missing_is_said():
    from lmsys.attention import flash_steps

    assert "interpreter" in flash_steps.no_tma(DEVICE, torch.bfloat16, 64)
    assert "Hopper" in flash_steps.no_specialization(DEVICE, torch.float16, 64)


@pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_specialized(head_dim, dtype, causal):
    from lmsys.attention import flash_steps

    reason = flash_steps.no_specialization(DEVICE, dtype, head_dim)
    if reason:
        pytest.skip(reason)
    for lengths in ((1, 1), (1000, 1000), (129, 500), (500, 129), (1024, 1024)):
        check(flash_steps.specialized_forward, *inputs(*lengths, head_dim, 4, 2, dtype, 2, DEVICE)[:3], causal)


COMPILE = """
import torch
torch.cuda.is_available = lambda: True  # else the module chooses the interpreter
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from lmsys.attention import flash_steps
types = {"lse_ptr": "*fp32", "scale": "fp32", "H": "i32", "H_kv": "i32", "T": "i32", "S": "i32"}
for name, rows in (("q_desc", 64), ("k_desc", 128), ("v_desc", 128), ("o_desc", 64)):
    block = [1, 1, rows, 64]
    types[name] = f"tensordesc<bf16{block},{gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)!r}>"
constants = {"CAUSAL": True, "STAGES": 4, "ROWS": 64, "BLOCK_K": 128, "D": 64}
kernel = flash_steps._specialized_kernel
signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
compiled = triton.compile(GluonASTSource(kernel, signature, constants, {}), GPUTarget("cuda", 90, 32), {"num_warps": 4})
ptx = compiled.asm["ptx"]
print("wgmma" in ptx, "cp.async.bulk.tensor" in ptx, compiled.metadata.shared <= 227 * 1024)
"""


@pytest.mark.skipif(ON_GPU, reason="the GPU runs it above")
def test_specialized_compiles_for_hopper_without_a_gpu(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True"] * 3, done.stderr
