import pytest
import torch

from lmsys import device


def test_resolve_device():
    assert device.resolve_device("cpu") == torch.device("cpu")
    assert device.resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for bad, message in (("cuda:99", "is not here"), ("tpu", "unknown device|not one"), ("meta", "not one")):
        with pytest.raises(ValueError, match=message):
            device.resolve_device(bad)


def test_peak_is_known_or_none_never_a_guess():
    assert device.peak_flops("NVIDIA H200", "bf16") == pytest.approx(989.5e12)
    assert device.peak_flops("NVIDIA H200", "fp8") is None
    assert device.peak_flops("Some GPU", "bf16") is None


def test_environment_on_a_copy_without_history(monkeypatch):
    monkeypatch.setattr(device, "_output", lambda *command: None)
    monkeypatch.setenv("LMSYS_GIT_COMMIT", "abc")
    assert device.git_state() == {"commit": "abc", "dirty": None}
