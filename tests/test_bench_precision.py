import math

import pytest
import torch

from lmsys.bench import experiment, precision


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """All three questions at smoke scale on the CPU: sums, dtypes, layer norm."""
    p = precision.NOTEBOOK.parameters({"scale": "smoke", "device": "cpu"})
    questions = (precision.SUMS, precision.DTYPES, precision.LAYER_NORM)
    return [experiment.run(one, p, folder=tmp_path_factory.mktemp("precision")) for one in questions]


def test_the_sums_are_those_of_ieee_rounding():
    sums = {precision.sum_name(*key): precision.accumulate(*key, 1000)[-1] for key in precision.ACCUMULATIONS}
    assert sums["fp32"] == pytest.approx(10.000134, abs=1e-6)
    assert sums["fp16"] == 9.953125 and sums["bf16"] == 4.0
    assert sums["fp16 into fp32"] == sums["fp16 into fp32, cast first"] == pytest.approx(10.002136, abs=1e-6)


@pytest.mark.parametrize("dtype, bits", [("fp16", 11), ("bf16", 8), ("fp32", 24)])
def test_spacing_is_the_distance_to_the_next_number(dtype, bits):
    kind = precision.TORCH_DTYPES[dtype]
    for value in (1.0, 4.0, 9.953125):
        here = torch.tensor(value, dtype=kind)
        above = torch.nextafter(here, torch.tensor(math.inf, dtype=kind)).item() if dtype != "fp16" else None
        if above is not None:
            assert precision.spacing(here.item(), dtype) == above - here.item()
    assert precision.spacing(1.0, dtype) == 2.0 ** (1 - bits)


def test_autocast_keeps_parameters_loss_and_gradients_in_fp32(answered):
    dtypes = answered[1]
    kinds = dtypes.set_index(["autocast", "tensor"])["dtype"]
    for low, name in (("fp16", "float16"), ("bf16", "bfloat16")):
        assert all(kinds[low, tensor] == "float32" for tensor in ("parameters", "loss", "gradients"))
        assert kinds[low, "output of the first layer"] == kinds[low, "logits"] == name


def test_statistics_in_fp32_are_layer_norm():
    x = torch.randn(4, 32)
    for statistics in precision.STATISTICS:
        expected = torch.nn.functional.layer_norm(x, (32,), eps=precision.EPS)
        torch.testing.assert_close(precision.layer_norm(x, statistics), expected, rtol=1e-5, atol=1e-5)


def test_fp16_overflows_and_bf16_rounds(answered):
    frame = answered[2]
    at = frame.assign(value=frame.value.round(6)).set_index(["what", "value", "dtype", "statistics"])
    assert at.lost["scale", 256, "fp16", "all low"] and at.lost["scale", 256, "fp16", "sums fp32"]
    assert not at.lost["scale", 256, "fp16", "inside fp32"] and not at.lost["scale", 256, "bf16", "all low"]
    errors = [at.error["scale", 1, "bf16", statistics] for statistics in precision.STATISTICS]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 2**-8
    assert at.error["mean", 1024, "bf16", "all low"] > 0.1 > at.error["mean", 1024, "bf16", "inside fp32"]


@pytest.mark.parametrize("bad", [{"additions": 0}, {"width": 1}, {"rows": 1.5}, {"scale": "tiny"}, {"device": "tpu"}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError):
        precision.NOTEBOOK.parameters({"scale": "smoke"} | bad)
