"""AdamW and clipping against torch's own, the schedule against its formula."""

import copy
import math

import pytest
import torch
from torch import nn

from lmsys.step.adamw import FusedAdamW
from lmsys.step.optimizer import AdamW, clip_factor, clip_grad_norm, cosine_schedule, parameter_groups


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def grads(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_adamw_follows_torch_over_steps():
    ours, theirs = net(), net()
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer, reference = AdamW(ours.parameters(), **settings), torch.optim.AdamW(theirs.parameters(), **settings)
    for step in range(50):
        for one in (optimizer, reference):
            one.param_groups[0]["lr"] = 1e-2 / (1 + step)
        grads(ours, step)
        grads(theirs, step)
        optimizer.step()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_first_step_is_the_learning_rate_and_decay_is_decoupled():
    parameter = nn.Parameter(torch.tensor([2.0, -3.0]))
    parameter.grad = torch.tensor([1e-3, 1e3])  # with bias correction, any gradient moves by lr
    AdamW([parameter], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(
        parameter.data, torch.tensor([2.0 * 0.95 - 0.1, -3.0 * 0.95 - 0.1]), rtol=1e-4, atol=1e-4
    )


def test_parameters_that_join_later_have_their_own_step():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(3)) for _ in range(2)]
    theirs = copy.deepcopy(ours)
    optimizer, reference = AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(4):
        for pair in zip(ours, theirs, strict=True):
            gradient = torch.randn(3)
            for parameter in pair:
                parameter.grad = gradient.clone()
        if step < 2:
            ours[1].grad = theirs[1].grad = None
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_state_round_trips_exactly():
    one, two = net(), net()
    first = AdamW(one.parameters(), lr=1e-2)
    for step in range(3):
        grads(one, step)
        first.step()
    two.load_state_dict(one.state_dict())
    second = AdamW(two.parameters(), lr=5.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in ((one, first), (two, second)):
        grads(model, 9)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_closure_and_bad_settings():
    model = net()
    optimizer = AdamW(model.parameters())

    def closure():
        loss = model(torch.ones(1, 5)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    with pytest.raises(ValueError, match="lr is -1"):
        AdamW(model.parameters(), lr=-1)
    with pytest.raises(ValueError, match="betas"):
        AdamW(model.parameters(), betas=(0.9, 1.0))


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Embedding(4, 3))
    model[0].bias.requires_grad = False
    decayed, plain = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[2].weight)}
    assert {id(p) for p in plain["params"]} == {id(model[1].weight), id(model[1].bias)}


def test_schedule_values():
    def rate(step, warmup=10, total=110):
        return cosine_schedule(step, learning_rate=1.0, min_learning_rate=0.1, warmup_steps=warmup, total_steps=total)

    assert [rate(step) for step in (0, 1, 5, 10)] == pytest.approx([0, 0.1, 0.5, 1.0])
    assert rate(35) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate(60) == pytest.approx(0.55)
    assert rate(110) == rate(500) == pytest.approx(0.1)
    assert rate(0, warmup=0) == 1.0
    assert rate(4, warmup=5, total=5) == pytest.approx(0.8)
    assert all(rate(step) > rate(step + 1) for step in range(10, 110))


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_follows_torch(max_norm):
    ours, theirs = net(), net()
    grads(ours, 3)
    grads(theirs, 3)
    norm = clip_grad_norm(ours.parameters(), max_norm)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    torch.testing.assert_close(norm, expected)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_clipping_can_be_off():
    model = net()
    assert clip_grad_norm(model.parameters(), 1.0).item() == 0  # no gradients yet
    grads(model, 3)
    before = [p.grad.clone() for p in model.parameters()]
    assert clip_grad_norm(model.parameters(), 0.0).item() > 1
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))


# --- FusedAdamW -----------------------------------------------------------------------------------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def tensors(dtype=torch.float32):
    """Shapes around the kernel's block of 2,048, and one without elements."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3,), (5, 7), (2048,), (33, 67), (0,), (1, 4097))
    return [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype)) for shape in shapes]


def give_gradients(parameters, seed, without=()):
    generator = torch.Generator().manual_seed(seed)
    for index, parameter in enumerate(parameters):
        grad = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
        parameter.grad = None if index in without else grad


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_fused_adamw_follows_torch(path):
    pytest.importorskip("triton")
    ours, theirs = tensors(), tensors()
    optimizer = FusedAdamW(ours, **SETTINGS, path=path)
    reference = torch.optim.AdamW(theirs, **SETTINGS)
    for step in range(6):
        for some in (ours, theirs):
            give_gradients(some, step, without=(1, 3) if step < 2 else ())
        optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 1e-2 / (1 + step)
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for name in ("exp_avg", "exp_avg_sq") if a in optimizer.state else ():
            torch.testing.assert_close(optimizer.state[a][name], reference.state[b][name], rtol=1e-5, atol=1e-7)
    assert [optimizer.state[a]["step"] for a in ours[:4]] == [6, 4, 6, 4]


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_gradients_are_scaled_on_the_way(path):
    pytest.importorskip("triton")
    ours, theirs = tensors(), tensors()
    for some in (ours, theirs):
        give_gradients(some, 0)
    norm = clip_grad_norm(ours, 0)
    FusedAdamW(ours, **SETTINGS, path=path).step(gradient_scale=clip_factor(norm, 0.5))
    torch.testing.assert_close(clip_grad_norm(theirs, 0.5), norm)
    AdamW(theirs, **SETTINGS).step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize("layout", ["vectors", "odd", "strided"])
def test_the_fused_norm_of_gradients_is_that_of_clipping(layout, path):
    """Two groups, some without a gradient; of whole vectors, odd lengths, and strided or unaligned ones."""
    pytest.importorskip("triton")
    shapes = [(8,), (16, 24), (2048,), (40, 520), (3, 4096)] if layout == "vectors" else [t.shape for t in tensors()]
    parameters = [nn.Parameter(torch.zeros(s, device=DEVICE)) for s in shapes]
    parameters += [nn.Parameter(torch.zeros(s, device=DEVICE)) for s in shapes]
    optimizer = FusedAdamW([{"params": parameters[:3]}, {"params": parameters[3:]}], **SETTINGS, path=path)
    assert optimizer.gradient_norm().item() == 0
    for without in ((), (1, 3)):
        give_gradients(parameters, len(without), without)
        if layout == "strided":
            parameters[6].grad = torch.cat((parameters[6].grad[:1], parameters[6].grad))[1:]
            parameters[9].grad = parameters[9].grad.t().contiguous().t()
        norm = optimizer.gradient_norm()
        wanted = torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None]).norm()
        assert norm.dtype == torch.float32
        torch.testing.assert_close(norm.double(), wanted, rtol=1e-6, atol=0)
        optimizer.step()


def test_gradients_of_any_strides_and_addresses():
    pytest.importorskip("triton")
    ours, theirs = tensors(), tensors()
    optimizer, reference = FusedAdamW(ours, **SETTINGS, path="triton"), AdamW(theirs, **SETTINGS)
    for step in range(3):
        for some in (ours, theirs):
            give_gradients(some, step)
        for parameter in ours[step:]:
            if parameter.ndim == 2:
                parameter.grad = parameter.grad.t().contiguous().t()
            else:
                parameter.grad = torch.cat((parameter.grad[:1], parameter.grad))[1:]  # 4 bytes past an aligned address
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_fused_and_plain_adamw_load_each_others_state(tmp_path):
    from safetensors.torch import save_file

    makers = (lambda p: AdamW(p, **SETTINGS), lambda p: FusedAdamW(p, **SETTINGS, path="torch"))
    for make, other in (makers, makers[::-1], (makers[1], makers[1])):
        ours, theirs = tensors(), tensors()
        first = make(ours)
        for step in range(3):
            give_gradients(ours, step, without=(1,))
            first.step()
        with torch.no_grad():
            for a, b in zip(ours, theirs, strict=True):
                b.copy_(a)
        second = other(theirs)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert theirs[1] not in second.state
        save_file({str(i): one["exp_avg"] for i, one in second.state_dict()["state"].items()}, tmp_path / "state")
        for some, optimizer in ((ours, first), (theirs, second)):
            give_gradients(some, 9)
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_fused_adamw_says_what_it_does_not_take():
    with pytest.raises(ValueError, match="contiguous"):
        FusedAdamW([nn.Parameter(torch.ones(3, 4).t())])
    with pytest.raises(ValueError, match="float64"):
        FusedAdamW([nn.Parameter(torch.ones(3, dtype=torch.float64))])
    with pytest.raises(ValueError, match="path is 'cuda'"):
        FusedAdamW([nn.Parameter(torch.ones(3))], path="cuda")


def test_norms_of_bf16_gradients_are_in_fp32():
    parameters = [nn.Parameter(torch.ones(1000, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    give_gradients(parameters, 0)
    wanted = torch.cat([parameter.grad.double() for parameter in parameters]).norm()
    torch.testing.assert_close(clip_grad_norm(parameters, 0).double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU is waited for always; needs a CUDA GPU")
def test_a_step_with_clipping_waits_for_nothing():
    module = nn.ParameterList(tensors())
    for fused in (False, True):
        optimizer = FusedAdamW(module.parameters()) if fused else AdamW(module.parameters())
        for step in range(2):
            give_gradients(module, step)
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                norm = optimizer.gradient_norm() if fused else clip_grad_norm(module.parameters(), 1.0)
                optimizer.step(**({"gradient_scale": clip_factor(norm, 1.0)} if fused else {}))
            finally:
                torch.cuda.set_sync_debug_mode("default")
