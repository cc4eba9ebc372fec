"""Which path flash_attention_triton takes, why, and that it is the one that runs."""

import importlib.util
import re
import sys
import types

import pytest
import torch
from attention_cases import inputs, with_gradients

from lmsys.attention import attention, explain, paths
from lmsys.attention.reference import reference_attention

KERNEL = "flash_attention_triton"

pytestmark = pytest.mark.filterwarnings("ignore:no CUDA GPU")


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(paths.VARIABLE, raising=False)


@pytest.fixture
def hopper_machine(monkeypatch):
    """The rule of the machine agrees, so that the other rules can be seen at work."""
    monkeypatch.setitem(paths.RULES, "machine", lambda call: None)


def half(q_len=8, k_len=8, head_dim=64, heads=2, kv_heads=2, dtype=torch.float16):
    return inputs(q_len, k_len, head_dim, heads, kv_heads, dtype)[:3]


def chosen(q, k, v, backward=False, **options):
    return paths.choose(q, k, v, causal=True, backward=backward, **options)


# --- The rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_the_hopper_path_takes(hopper_machine, dtype, head_dim):
    q, k, v = half(7, 13, head_dim, 4, 2, dtype)
    for backward in (False, True):
        assert chosen(q, k, v, backward) == ("hopper", ())
    packed = torch.zeros(2, 9, 3, 4, head_dim, dtype=dtype)  # as a model makes q, k and v
    assert chosen(*packed.permute(2, 0, 3, 1, 4).unbind(0)) == ("hopper", ())
    assert (
        chosen(*(t[..., None, :1, :].transpose(-2, -3) for t in (q, k, v))).name == "hopper"
    )  # dimensions of length 1


def test_each_rule_gives_its_reason(hopper_machine):
    q, k, v = half()
    uneven = torch.zeros(1, 2, 8, 68, dtype=torch.float16)[..., :64]
    for case, reason in (
        (half(dtype=torch.float32), "dtype is float32; it takes float16 and bfloat16"),
        (half(head_dim=80), "head_dim is 80; it takes 64 and 128"),
        (
            (q, k.transpose(-2, -1).contiguous().transpose(-2, -1), v),
            "k has stride 8 in its last dimension; it takes 1",
        ),
        ((q, k, uneven), r"v has strides \(1088, 544, 68, 1\); it takes positive multiples of 16 bytes"),
        ((q[:, :1].expand_as(q), k, v), r"q has strides \(1024, 0, 64, 1\)"),
        ((torch.empty(1, 2**20, 2**11, 64, device="meta", dtype=torch.float16), k, v), "less than 2.31"),
    ):
        path, (given,) = chosen(*case)
        assert path == "portable" and re.search(reason, given)
        with pytest.raises(ValueError, match=f"'{KERNEL}': got path='hopper'.*forward pass.*{reason}"):
            chosen(*case, path="hopper")


def test_all_reasons_are_given(hopper_machine):
    case = half(head_dim=80, dtype=torch.float32)
    assert len(chosen(*case).reasons) == 1  # the first decides
    assert explain(*case).reasons == (
        "dtype is float32; it takes float16 and bfloat16",
        "head_dim is 80; it takes 64 and 128",
    )
    with pytest.raises(ValueError, match="dtype is float32.*; head_dim is 80"):
        chosen(*case, path="hopper")


def test_an_address_off_the_alignment_is_refused(hopper_machine, monkeypatch):
    class OnGpu:
        """A CUDA tensor, of which only the address matters."""

        dtype, itemsize, shape, device = torch.float16, 2, torch.Size((1, 2, 8, 64)), torch.device("cuda")

        def __init__(self, address):
            self.data_ptr = lambda: address
            self.stride = torch.empty(self.shape, device="meta").stride
            self.numel = self.shape.numel

    assert chosen(OnGpu(512), OnGpu(16), OnGpu(32)).name == "hopper"
    path, reasons = chosen(OnGpu(512), OnGpu(16), OnGpu(40))
    assert path == "portable" and reasons == ("v starts at an address that is no multiple of 16 bytes",)


def test_deterministic_gradients_are_portable(hopper_machine):
    qkv = half()
    assert chosen(*qkv, deterministic=True).name == "hopper"  # the forward pass has one order of sums
    path, reasons = chosen(*qkv, backward=True, deterministic=True)
    assert path == "portable" and "atomic" in reasons[0]
    with pytest.raises(ValueError, match="backward pass.*atomic adds"):
        chosen(*qkv, backward=True, deterministic=True, path="hopper")
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen(*qkv).name == "hopper" and chosen(*qkv, backward=True).name == "portable"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_the_machine_without_a_gpu_is_refused_with_reasons():
    path, reasons = chosen(*half())
    assert path == "portable" and reasons == ("the tensors are on cpu; it needs a CUDA GPU of compute capability 9.0",)
    assert "on meta" in chosen(*(t.to("meta") for t in half()))[1][0]
    assert "interpreter is on" in paths._machine_of.__wrapped__(torch.device("cuda"))


@pytest.mark.parametrize(
    "hip,capability,gluon,reason",
    [
        ("6.4", (9, 4), True, "AMD"),
        (None, (8, 0), True, "capability 8.0"),
        (None, (10, 0), True, "capability 10.0"),
        (None, (9, 0), False, "no Gluon"),
        (None, (9, 0), True, None),
    ],
)
def test_the_rule_of_the_machine(monkeypatch, hip, capability, gluon, reason):
    monkeypatch.setattr(paths, "interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if gluon else None)
    refusal = paths._machine_of.__wrapped__(torch.device("cuda", 0))
    assert refusal is None if reason is None else reason in refusal


# --- Argument and environment variable ------------------------------------------------------------


def test_the_argument_wins_over_the_variable(hopper_machine, monkeypatch):
    qkv = half()
    assert chosen(*qkv, path="portable") == ("portable", ("path='portable' asks for it",))
    monkeypatch.setenv(paths.VARIABLE, "portable")
    assert chosen(*qkv) == ("portable", ("the environment variable LMSYS_FLASH_PATH=portable asks for it",))
    assert chosen(*qkv, path="hopper") == ("hopper", ("path='hopper' asks for it",))
    monkeypatch.setenv(paths.VARIABLE, "hopper")
    assert chosen(*qkv).name == "hopper"
    with pytest.raises(ValueError, match="LMSYS_FLASH_PATH=hopper, and the hopper path's forward pass.*head_dim is 80"):
        chosen(*half(head_dim=80))
    assert chosen(*half(head_dim=80), path="portable").name == "portable"
    for same_as_unset in ("auto", ""):
        monkeypatch.setenv(paths.VARIABLE, same_as_unset)
        assert chosen(*qkv) == ("hopper", ())


def test_unknown_paths_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=f"'{KERNEL}': got path='fast'; it takes 'auto', 'portable', 'hopper'"):
        attention(*half(), causal=True, kernel=KERNEL, path="fast")
    with pytest.raises(ValueError, match="got path='fast'; it takes auto, portable, hopper"):
        chosen(*half(), path="fast")
    monkeypatch.setenv(paths.VARIABLE, "fast")
    with pytest.raises(ValueError, match="variable LMSYS_FLASH_PATH=fast; it takes auto, portable, hopper"):
        chosen(*half())


# --- explain --------------------------------------------------------------------------------------


def test_explain(hopper_machine):
    both = explain(*half(), True)
    assert (both.forward, both.backward, both.reasons) == ("hopper", "hopper", ())
    assert str(both) == "forward: hopper, backward: hopper\n- no rule refuses the hopper path"
    mixed = explain(*half(), True, deterministic=True)
    assert (mixed.forward, mixed.backward) == ("hopper", "portable") and len(mixed.reasons) == 1
    neither = explain(*(t.to("meta") for t in half(dtype=torch.float32)), False)
    assert (neither.forward, neither.backward) == ("portable", "portable")
    assert str(neither).splitlines()[1:] == ["- dtype is float32; it takes float16 and bfloat16"]
    asked = explain(*half(), True, path="portable")
    assert asked.reasons == ("path='portable' asks for it",)


# --- The path that is chosen is the one that runs -------------------------------------------------


@pytest.fixture
def hopper_calls(hopper_machine, monkeypatch):
    """Stand-ins for the hopper path's modules, which need a Hopper GPU.

    They count calls, and the portable kernels do the work.
    """
    from lmsys.attention import flash_triton

    calls = []

    def forward(q, k, v, causal, scale):
        calls.append(("forward", causal, scale))
        return flash_triton.portable_forward(q, k, v, causal, scale)

    def backward(q, k, v, o, lse, do, causal, scale):
        calls.append(("backward", causal, scale))
        return flash_triton.portable_backward(q, k, v, o, lse, do, causal, scale)

    for name, function in (("flash_hopper", forward), ("flash_hopper_backward", backward)):
        module = types.ModuleType(f"lmsys.attention.{name}")
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(sys.modules["lmsys.attention"], name, module, raising=False)
    return calls


def gradients(**options):
    q, k, v, do = inputs(8, 8, 64, 2, 1, torch.float16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = [t.to(device) for t in (q, k, v, do)]
    return with_gradients(lambda *qkv: attention(*qkv, causal=True, kernel=KERNEL, **options), *case)


def test_auto_runs_hopper_with_the_callers_scale(hopper_calls):
    gradients(scale=0.3)
    assert hopper_calls == [("forward", True, 0.3), ("backward", True, 0.3)]
    gradients()
    assert hopper_calls[2:] == [("forward", True, 0.125), ("backward", True, 0.125)]


def test_deterministic_runs_hopper_forward_and_portable_backward(hopper_calls):
    gradients(deterministic=True)
    assert [name for name, *_ in hopper_calls] == ["forward"]


def test_portable_runs_nothing_of_hopper(hopper_calls, monkeypatch):
    gradients(path="portable")
    monkeypatch.setenv(paths.VARIABLE, "portable")
    gradients()
    assert hopper_calls == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's")
def test_the_choice_is_made_again_inside_a_compiled_graph(hopper_calls, monkeypatch):
    """One graph, whose operators choose when they run."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *qkv: attention(*qkv, causal=True, kernel=KERNEL, scale=0.3), backend="aot_eager", fullgraph=True
    )
    case = inputs(8, 8, 64, 2, 1, torch.float16)
    first = with_gradients(compiled, *case)
    assert hopper_calls == [("forward", True, 0.3), ("backward", True, 0.3)]
    monkeypatch.setenv(paths.VARIABLE, "portable")
    second = with_gradients(compiled, *case)
    assert len(hopper_calls) == 2
    expected, _ = reference_attention(*(t.double() for t in case[:3]), causal=True, scale=0.3)
    for o in (first[0], second[0]):
        torch.testing.assert_close(o.double(), expected, rtol=2e-3, atol=2e-3)
