"""The model against plain, independent computations; its cost against cost.py."""

import math

import adapters
import pytest
import torch

from lmsys import cost
from lmsys.config import ModelConfig
from lmsys.model import RMSNorm, RotaryEmbedding, SwiGLU, TransformerLM, cross_entropy

TINY = ModelConfig(d_model=32, d_ff=48, num_layers=2, num_heads=4, context_length=24, vocab_size=61)


@pytest.fixture
def model() -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(TINY)


def plain_logits(model: TransformerLM, ids: torch.Tensor) -> torch.Tensor:
    """The whole model written out in float64, a head and a query at a time."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    config = model.config
    d, head_dim = config.d_model, config.head_dim

    def norm(x, gain):
        return x / torch.sqrt((x**2).sum(-1, keepdim=True) / d + 1e-5) * gain

    def rope(x):  # (T, D)
        pairs = torch.complex(x[:, 0::2], x[:, 1::2])
        rates = torch.tensor([config.rope_theta ** (-2 * i / head_dim) for i in range(head_dim // 2)])
        angles = torch.arange(len(x))[:, None].double() * rates.double()
        turned = pairs * torch.exp(1j * angles)
        return torch.stack((turned.real, turned.imag), -1).reshape(x.shape)

    rows = []
    for row in ids:
        x = weights["token_embeddings.weight"][row]
        for i in range(config.num_layers):
            layer = {name.removeprefix(f"layers.{i}."): tensor for name, tensor in weights.items()}
            y = norm(x, layer["ln1.weight"])
            q, k, v = (y @ part.T for part in layer["attn.qkv_proj.weight"].split(d))
            heads = []
            for h in range(config.num_heads):
                part = slice(h * head_dim, (h + 1) * head_dim)
                qh, kh, vh = rope(q[:, part]), rope(k[:, part]), v[:, part]
                out = [
                    torch.softmax(kh[: t + 1] @ qh[t] / math.sqrt(head_dim), 0) @ vh[: t + 1] for t in range(len(row))
                ]
                heads.append(torch.stack(out))
            x = x + torch.cat(heads, -1) @ layer["attn.output_proj.weight"].T
            y = norm(x, layer["ln2.weight"])
            gate = y @ layer["ffn.w1.weight"].T
            x = x + (gate / (1 + torch.exp(-gate)) * (y @ layer["ffn.w3.weight"].T)) @ layer["ffn.w2.weight"].T
        x = norm(x, weights["ln_final.weight"])
        rows.append(x @ weights.get("lm_head.weight", weights["token_embeddings.weight"]).T)
    return torch.stack(rows)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_formulas(tied):
    torch.manual_seed(0)
    config = ModelConfig(32, 48, 2, 4, 24, 61, rope_theta=1000.0, tie_embeddings=tied)
    model = TransformerLM(config)
    for parameter in model.parameters():  # gains of one would hide a missing gain
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    ids = torch.randint(61, (2, 17))
    torch.testing.assert_close(model(ids).double(), plain_logits(model, ids), rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_formulas(model):
    ids, targets = torch.randint(61, (2, 9)), torch.randint(61, (2, 9))
    cross_entropy(model(ids), targets).backward()
    twin = TransformerLM(TINY).double()
    twin.load_state_dict(model.state_dict())
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    twin.state_dict = lambda: weights  # plain_logits then reads leaves that require grad
    torch.nn.functional.cross_entropy(plain_logits(twin, ids).flatten(0, 1), targets.flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), weights[name].grad, rtol=1e-3, atol=1e-5, msg=name)


def test_rope_turns_interleaved_pairs_and_keeps_relative_positions():
    rope = RotaryEmbedding(8, 64, 100.0)
    x = torch.randn(3, 5, 8)
    positions = torch.tensor([0, 3, 9, 10, 63])
    y = rope(x, positions)
    for t, position in enumerate(positions.tolist()):
        for i in range(4):
            angle = position * 100.0 ** (-2 * i / 8)
            a, b = x[:, t, 2 * i], x[:, t, 2 * i + 1]
            torch.testing.assert_close(y[:, t, 2 * i], a * math.cos(angle) - b * math.sin(angle), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                y[:, t, 2 * i + 1], a * math.sin(angle) + b * math.cos(angle), rtol=1e-4, atol=1e-5
            )
    torch.testing.assert_close(rope(x), rope(x, torch.arange(5)))
    q, k = torch.randn(8), torch.randn(8)
    dots = [rope(q[None], torch.tensor([t + 7])) @ rope(k[None], torch.tensor([t])).T for t in (0, 20, 50)]
    torch.testing.assert_close(dots[1], dots[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dots[2], dots[0], rtol=1e-4, atol=1e-4)


def test_rope_in_its_compiled_form_is_the_same(monkeypatch):
    rope, x = RotaryEmbedding(8, 16), torch.randn(2, 16, 8, requires_grad=True)
    upstream = torch.randn(2, 16, 8)
    eager = rope(x)
    (eager_grad,) = torch.autograd.grad(eager, x, upstream)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    real = rope(x)
    torch.testing.assert_close(real, eager)
    torch.testing.assert_close(torch.autograd.grad(real, x, upstream)[0], eager_grad)


def test_rmsnorm_computes_in_fp32():
    norm = RMSNorm(64)
    x = (torch.randn(4, 64) * 300).to(torch.float16)  # squares overflow float16
    expected = x.double() / torch.sqrt((x.double() ** 2).mean(-1, keepdim=True) + 1e-5)
    y = norm(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)


def test_swiglu_is_its_formula():
    ffn, x = SwiGLU(6, 10), torch.randn(3, 6)
    gate = x @ ffn.w1.weight.T
    torch.testing.assert_close(ffn(x), (gate * torch.sigmoid(gate) * (x @ ffn.w3.weight.T)) @ ffn.w2.weight.T)


def test_later_tokens_do_not_change_earlier_logits(model):
    ids = torch.randint(61, (1, 20))
    changed = ids.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 61
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize("tied", [False, True])
def test_initial_loss_is_near_ln_v_and_weights_are_truncated(tied):
    torch.manual_seed(0)
    config = ModelConfig(64, 96, 2, 2, 32, 500, tie_embeddings=tied)
    model = TransformerLM(config)
    ids = torch.randint(500, (4, 32))
    assert abs(cross_entropy(model(ids), torch.randint(500, (4, 32))).item() - math.log(500)) < 0.7
    std = 64**-0.5 if tied else 1.0
    embedding = model.token_embeddings.weight
    assert embedding.abs().max() <= 3 * std and abs(embedding.std() / std - 0.9866) < 0.02  # of a normal cut at 3
    w1 = model.layers[0].ffn.w1.weight
    assert abs(w1.std() / math.sqrt(2 / (64 + 96)) - 0.9866) < 0.03


def test_parameters_are_those_of_cost(model):
    for config in (TINY, ModelConfig(16, 40, 3, 2, 8, 33, tie_embeddings=True)):
        assert TransformerLM(config).num_parameters() == cost.model_parameters(config)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}  # RoPE's tables are not saved


def test_flops_are_those_of_cost(model):
    """torch counts every pair of queries and keys.

    Cost.py's count for MFU counts half of them, and the gains as products.
    """
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.randint(61, (2, 24))
    with FlopCounterMode(display=False) as counter:
        logits = model(ids)
    assert counter.get_total_flops() == cost.forward_flops(TINY, 2, 24, causal=False)
    with FlopCounterMode(display=False) as counter:
        logits = model(ids)
        cross_entropy(logits, ids).backward()
    tokens, d, layers = 2 * 24, TINY.d_model, TINY.num_layers
    gains = 6 * (2 * layers + 1) * d
    unmasked_attention = 6 * layers * d * 24
    assert counter.get_total_flops() == tokens * (cost.train_flops_per_token(TINY) - gains + unmasked_attention)


def test_bad_input_is_named(model):
    with pytest.raises(ValueError, match=r"25 tokens are more than the model's context_length 24"):
        model(torch.zeros(1, 25, dtype=torch.int64))
    with pytest.raises(ValueError, match="token id 61 is outside the model's vocabulary of 61"):
        model(torch.tensor([[1, 61]]))
    with pytest.raises(ValueError, match="token id -1 is outside"):
        model(torch.tensor([[1, -1]]))
    with pytest.raises(ValueError, match=r"vocab_size is not set"):
        TransformerLM(ModelConfig(32, 48, 1, 2, 16))


def test_attention_kernel_is_chosen_by_name(model):
    ids = torch.randint(61, (1, 10))
    expected = model(ids)
    model.set_attention_kernel("flash_attention_torch")
    assert model.layers[1].attn.kernel == "flash_attention_torch"
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)
    for choose in (model.set_attention_kernel, lambda name: TransformerLM(TINY, attention_kernel=name)):
        with pytest.raises(ValueError, match=r"flash_atention_torch.*flash_attention_torch"):
            choose("flash_atention_torch")


def test_a_kernel_that_does_not_take_the_dtype_is_named():
    model = TransformerLM(TINY, attention_kernel="torch_flex")  # head_dim 8 is too small for it
    with pytest.raises(ValueError, match=r"'torch_flex': got head_dim 8; it takes 16 to 256"), torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.int64))


def test_cross_entropy_is_stable_and_exact():
    logits = torch.randn(3, 5, 11, requires_grad=True)
    targets = torch.randint(11, (3, 5))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(cross_entropy(logits, targets), expected)
    huge = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    assert cross_entropy(huge, torch.tensor([0, 1])).item() == 0
    assert cross_entropy(huge.bfloat16(), torch.tensor([1, 1])).dtype == torch.float32


def test_bf16_autocast_runs_and_stays_near(model):
    ids = torch.randint(61, (2, 16))
    exact = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids)
        loss = cross_entropy(logits, ids)
    loss.backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert (logits.float() - exact).abs().max() < 0.1
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_compiled_blocks_agree(model):
    ids = torch.randint(61, (2, 16))
    expected = model(ids)
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(ids), expected, rtol=1e-4, atol=1e-4)
    model.compile_blocks(backend="aot_eager", fullgraph=True)  # all of torch.compile but the slow code generation
    torch._dynamo.utils.counters.clear()
    logits = model(ids)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # one compilation for all blocks
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    cross_entropy(logits, ids).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_courses_weights_load_through_the_adapters(model):
    weights = {}
    for name, tensor in model.state_dict().items():
        if "qkv_proj" in name:
            for part, matrix in zip("qkv", tensor.split(TINY.d_model), strict=True):
                weights[name.replace("qkv_proj", f"{part}_proj")] = matrix
        else:
            weights[name] = tensor
    ids = torch.randint(61, (2, 12))
    assert torch.equal(adapters.run_transformer_lm(61, 24, 32, 2, 4, 48, 10_000.0, weights, ids), model(ids))
    block = {name.removeprefix("layers.0."): w for name, w in weights.items() if name.startswith("layers.0.")}
    x = torch.randn(2, 12, 32)
    expected = model.layers[0](x, model.rope.cos[:12], model.rope.sin[:12])
    assert torch.equal(adapters.run_transformer_block(32, 4, 48, 24, 10_000.0, block, x), expected)


def test_fused_parts_compute_the_same_model():
    """Loss and gradients of targets given, with rotation fused and the gate merged, against the plain model's."""
    torch.manual_seed(0)
    config = ModelConfig(16, 32, 2, 2, 12, 40)
    plain, fused = (TransformerLM(config) for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    fused.fuse(rope=True, gate=True)
    ids, targets = torch.randint(40, (2, 2, 12))
    cross_entropy(plain(ids), targets).backward()
    fused(ids, targets).backward()
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_residual_stream_has_the_dtype_that_it_is_given():
    model = TransformerLM(ModelConfig(16, 32, 2, 2, 12, 40))
    seen = []
    model.ln_final.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (None, torch.bfloat16):
            model.fuse(residual_dtype=dtype)(torch.zeros(1, 3, dtype=torch.int64))
    assert seen == [torch.float32, torch.bfloat16]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
