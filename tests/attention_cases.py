"""What the attention tests share.

Inputs, gradients, and the comparison with float64 that FlashAttention's own tests make.
"""

import torch

from lmsys.attention import attention
from lmsys.attention.reference import reference_attention

# Largest error allowed beside twice PyTorch's: where PyTorch's is zero, as for a single key, another order of sums is
# not.
FLOOR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}

# q_len, k_len, head_dim, heads, kv_heads, dtype
CASES = [
    (1, 1, 16, 1, 1, torch.float32),
    (1, 129, 32, 2, 1, torch.float16),
    (7, 63, 80, 2, 2, torch.float32),
    (63, 7, 16, 3, 1, torch.float16),
    (63, 63, 128, 1, 1, torch.float16),
    (129, 63, 64, 2, 1, torch.float32),
    (63, 129, 100, 1, 1, torch.float32),
    (500, 129, 16, 1, 1, torch.float32),
    (129, 500, 24, 1, 1, torch.float16),
    (64, 64, 64, 4, 2, torch.float32),
]


def inputs(q_len, k_len, head_dim, heads=1, kv_heads=None, dtype=torch.float32, batch=1, device="cpu", seed=0):
    """q, k, v and the gradient of the output, random normal."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, q_len), (kv_heads or heads, k_len), (kv_heads or heads, k_len), (heads, q_len)]
    return [torch.randn(batch, h, n, head_dim, generator=generator).to(device, dtype) for h, n in shapes]


def with_gradients(function, q, k, v, do):
    """[o, dq, dk, dv] of o = function(q, k, v)."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    o = function(q, k, v)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), do)]


def plain(q, k, v, causal, scale=None):
    """PyTorch's attention in the dtype of its inputs."""
    return reference_attention(q, k, v, causal=causal, scale=scale)[0]


def assert_as_good_as_pytorch(kernel, q, k, v, do, causal, backward=True, floor=None, scale=None, **options):
    """Against float64, the kernel's largest error is at most twice PyTorch's in the same dtype, plus the floor."""
    floor = FLOOR[q.dtype] if floor is None else floor

    def ours(q, k, v):
        return attention(q, k, v, causal=causal, kernel=kernel, scale=scale, **options)

    if backward:
        actual = with_gradients(ours, q, k, v, do)
        same_dtype = with_gradients(lambda *qkv: plain(*qkv, causal, scale), q, k, v, do)
        exact = with_gradients(lambda *qkv: plain(*qkv, causal, scale), *(t.double() for t in (q, k, v, do)))
    else:
        actual, same_dtype = [ours(q, k, v)], [plain(q, k, v, causal, scale)]
        exact = [plain(q.double(), k.double(), v.double(), causal, scale)]
    for name, a, p, e in zip(("o", "dq", "dk", "dv"), actual, same_dtype, exact, strict=False):
        assert a.shape == e.shape and a.dtype == q.dtype, name
        error, allowed = (a - e).abs().max(), 2 * (p - e).abs().max() + floor
        assert error <= allowed, f"{kernel} {name}: error {error:.2e}, allowed {allowed:.2e}"
