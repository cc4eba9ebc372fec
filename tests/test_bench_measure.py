import gc
import os
import time

import pytest
import torch

from lmsys.bench.measure import (
    StepClock,
    _parsed_state,
    failure,
    gpu_state,
    is_out_of_memory,
    measure,
    measure_steps,
    quantiles,
    settled,
    time_steps,
    writes,
)

CPU = torch.device("cpu")


def test_times_the_function_and_not_its_preparation():
    def prepare():
        time.sleep(0.02)
        return (0.005,)

    result = measure(time.sleep, device=CPU, warmup=1, iterations=5, prepare=prepare)
    assert result.samples == 5
    assert 5 <= result.p20_ms <= result.median_ms <= result.p80_ms < 20


def test_a_slow_function_is_sampled_less_but_not_under_three_times():
    calls = []

    def slow():
        calls.append(time.sleep(0.02))

    assert measure(slow, device=CPU, warmup=9, iterations=50, budget_s=0.1).samples in (3, 4, 5)
    assert len(calls) < 20
    assert measure(slow, device=CPU, warmup=9, iterations=50, budget_s=0.01).samples == 3
    assert measure(slow, device=CPU, warmup=1, iterations=2, budget_s=0.01).samples == 2


def test_the_first_call_which_compiles_does_not_count():
    first = []

    def compiles():
        if not first:
            first.append(time.sleep(0.3))

    assert measure(compiles, device=CPU, warmup=1, iterations=20, budget_s=0.1).samples == 20


def test_peak_memory_counts_inputs_and_the_largest_sum_of_what_is_alive():
    a = torch.randn(256, 1024)  # 1 MiB

    def function():
        b = a + 1  # 1 MiB alive with a
        c = b * 2  # 2 MiB more
        del b
        return c + 1  # still 2: b is gone

    result = measure(function, device=CPU, warmup=1, iterations=1, resident=[a])
    assert result.peak_mib == pytest.approx(3.0, rel=1e-3)  # and a scalar or two


def test_errors_are_the_callers_and_out_of_memory_is_told_from_others():
    for call, expected in ((lambda: torch.empty(2**60), "oom"), (lambda: 1 / 0, "error")):
        with pytest.raises((RuntimeError, ZeroDivisionError)) as caught:
            measure(call, device=CPU, warmup=1, iterations=1)
        assert failure(caught.value)["status"] == expected
    assert is_out_of_memory(MemoryError())


def test_the_host_gets_twice_the_time_that_it_needs_within_bounds():
    assert writes(host_ms=1.0, write_ms=0.06) == 34  # 2.04 ms
    assert writes(0.01, 0.06) == 8 and writes(100.0, 0.06) == 160


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_slow_launch_is_not_in_the_time():
    x = torch.zeros(8, device="cuda")

    def slow():
        time.sleep(2e-3)
        x.add_(1)

    found = measure(slow, device=x.device, warmup=3, iterations=10)
    assert found.median_ms < 0.5


def test_the_collector_does_not_look_through_what_was_there_before():
    held = [[]]
    with pytest.raises(KeyError), settled():
        assert not any(found is held for found in gc.get_objects())
        raise KeyError
    assert any(found is held for found in gc.get_objects())


def test_quantiles():
    assert quantiles([5.0, 1.0, 2.0, 3.0, 4.0]) == pytest.approx((3.0, 1.8, 4.2))


class FakeDevice:
    """A device that works behind the host's back.

    A step is queued at once, and its time passes when the clock waits for it.
    """

    def __init__(self, durations_ms):
        self.durations_ms, self.now_s, self.queued_s = iter(durations_ms), 0.0, 0.0

    def step(self):
        self.queued_s += next(self.durations_ms) / 1e3

    def read_s(self):
        self.now_s, self.queued_s = self.now_s + self.queued_s, 0.0
        return self.now_s


def test_steps_on_a_device_with_known_durations():
    samples = [5.0, 1.0, 2.0, 3.0, 4.0]
    device = FakeDevice([900.0, 30.0, 7.0, *samples, 0.0])  # the last call finds the memory
    result = measure_steps(device.step, device=CPU, clock=device, warmup=3, steps=5)
    assert result.warmup_ms == pytest.approx([900, 30, 7]) and result.times_ms == pytest.approx(samples)
    assert result.mean_ms == pytest.approx(3) and result.std_ms == pytest.approx(2.5**0.5)
    assert (result.median_ms, result.p20_ms, result.p80_ms) == pytest.approx((3.0, 1.8, 4.2))
    assert result.samples == 5 and result.reserved_mib is None


def test_slow_steps_are_fewer_by_the_second_warm_up_step():
    def counts(step_ms, warmup=5, steps=10):
        device = FakeDevice([9000.0, *[step_ms] * 50])
        return [len(times) for times in time_steps(device.step, clock=device, warmup=warmup, steps=steps, budget_s=1.0)]

    assert counts(10) == [5, 10]
    assert counts(160) == [5, 6]
    assert counts(900) == [3, 3]
    assert counts(5000) == [2, 3]
    assert counts(5000, warmup=1) == [1, 10], "the first step says nothing about the next"


def test_no_sample_pays_for_the_garbage_collector():
    states = []
    measure_steps(lambda: states.append(gc.isenabled()), device=CPU, clock=StepClock(CPU), warmup=1, steps=2)
    assert states[:3] == [False] * 3 and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        measure_steps(lambda: 1 / 0, device=CPU, clock=StepClock(CPU), warmup=1, steps=1)
    assert gc.isenabled()


def test_memory_of_a_step_is_over_what_is_resident():
    held = [torch.zeros(256, 1024)]  # 1 MiB
    result = measure_steps(
        lambda: held[0] + 1, device=CPU, clock=StepClock(CPU), warmup=0, steps=1, resident=lambda: held
    )
    assert result.peak_mib == pytest.approx(2.0, rel=1e-3) and result.std_ms is None and result.warmup_ms == []


def test_timing_costs_little():
    assert 0 < StepClock(CPU).overhead_ms() < 0.1


def test_the_state_of_a_gpu_as_nvidia_smi_prints_it():
    processes = f"{os.getpid()}, 1024 MiB\n77, 512 MiB"
    state = _parsed_state(("clocks.sm", "temperature.gpu"), "1980 MHz, 41\n", processes)
    assert state == {
        "clocks.sm": "1980 MHz",
        "temperature.gpu": "41",
        "processes": [
            {"pid": str(os.getpid()), "memory": "1024 MiB", "this": True},
            {"pid": "77", "memory": "512 MiB", "this": False},
        ],
    }
    assert gpu_state(CPU) is None
