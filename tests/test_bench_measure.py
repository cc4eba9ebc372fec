import time

import pytest
import torch

from lmsys.bench.measure import is_out_of_memory, measure, quantiles

CPU = torch.device("cpu")


def test_times_the_function_and_not_its_preparation():
    def prepare():
        time.sleep(0.02)
        return (0.005,)

    result = measure(time.sleep, device=CPU, warmup=1, iterations=5, prepare=prepare)
    assert result.status == "ok" and result.samples == 5
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


def test_out_of_memory_is_a_status_and_other_errors_are_errors():
    def too_much():
        torch.empty(2**60)

    result = measure(too_much, device=CPU, warmup=1, iterations=1)
    assert (result.status, result.median_ms) == ("oom", None) and result.note
    with pytest.raises(RuntimeError, match="mine"):
        measure(lambda: (_ for _ in ()).throw(RuntimeError("mine")), device=CPU, warmup=1, iterations=1)
    assert is_out_of_memory(MemoryError())


def test_quantiles():
    assert quantiles([5.0, 1.0, 2.0, 3.0, 4.0]) == pytest.approx((3.0, 1.8, 4.2))
