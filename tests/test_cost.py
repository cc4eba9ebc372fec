import math

import pytest
import torch

from lmsys import cost
from lmsys.config import model_size
from lmsys.model import TransformerLM

CONFIGS = [
    model_size("tiny", vocab_size=100, context_length=16),
    model_size("tiny", vocab_size=100, context_length=16, tie_embeddings=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["untied", "tied"])
def test_parameter_sizes_are_those_of_the_model_in_the_order_of_its_gradients(config):
    model = TransformerLM(config)
    arrived = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: arrived.append(p.numel()))
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    sizes = cost.parameter_sizes(config)
    assert sum(sizes) == cost.model_parameters(config) == model.num_parameters()
    assert arrived == sizes


def test_memory_at_adds_up_and_shards():
    config = CONFIGS[0]
    whole = 4 * cost.model_parameters(config)
    at = {name: list(cost.memory_at(config, name, 4).values()) for name in cost.SHARDINGS}
    assert at["replicated"] == [whole, 2 * whole, 4 * whole]
    assert at["zero1"] == [whole, 2 * whole, 2.5 * whole]
    assert at["zero2"] == [whole, 1.25 * whole, 1.75 * whole]
    gains = 4 * (2 * config.num_layers + 1) * config.d_model
    held = gains + (whole - gains) / 4
    assert at["fsdp"] == [held, 2 * held, 4 * held]
    with pytest.raises(ValueError, match="unknown sharding 'zero3'"):
        cost.memory_at(config, "zero3", 2)


def test_a_link_is_found_again_from_its_times():
    link = cost.Link(20e-6, 3e11)
    sizes = [2.0**power for power in range(20, 31)]
    for op in cost.COLLECTIVES:
        found = cost.Link.fit(op, 4, sizes, [link.seconds(op, size, 4) for size in sizes])
        assert found.latency_s == pytest.approx(link.latency_s) and found.bandwidth == pytest.approx(link.bandwidth)
    through_origin = cost.Link.fit("all_gather", 2, [1e6, 1e8], [1e-6, 3e-4])  # a line would begin below 0
    assert through_origin.latency_s == 0 and through_origin.bandwidth > 0
    with pytest.raises(ValueError, match="do not grow"):
        cost.Link.fit("all_gather", 2, [1e6, 1e8], [1e-3, 1e-6])
    with pytest.raises(ValueError, match="two sizes"):
        cost.Link.fit("all_gather", 2, [1e6], [1e-3])
    with pytest.raises(ValueError, match="unknown collective 'broadcast'"):
        cost.bus_factor("broadcast", 2)


def test_buckets_hold_every_byte_in_order():
    sizes = [5, 1, 1, 1, 7, 2]
    assert cost.buckets(sizes, 4, 0) == [20, 4, 4, 4, 28, 8]
    assert cost.buckets(sizes, 4, 12) == [20, 12, 28, 8]
    assert cost.buckets(sizes, 4, math.inf) == [4 * sum(sizes)]


def test_exposed_communication():
    link = cost.Link(0.5, 1.0)  # two devices: an all-reduce of s bytes takes 0.5 + s seconds
    assert cost.exposed_communication([3.0, 1.0], link, 2) == pytest.approx(5.0)  # nothing to hide behind
    # Ready at 30 and 40 seconds: the first is done at 33.5, the second ends 1.5 after the backward pass.
    assert cost.exposed_communication([3.0, 1.0], link, 2, backward_s=40) == pytest.approx(1.5)
    # Ready at 3 and 4: the first ends at 6.5, the second at 8.
    assert cost.exposed_communication([3.0, 1.0], link, 2, backward_s=4) == pytest.approx(4.0)


def test_the_best_bucket_size_is_the_minimum_of_the_overhead():
    size, bandwidth, overhead = 6e9, 3e11, 2e-5
    best = cost.best_bucket_bytes(size, bandwidth, overhead)
    at = {factor: cost.ddp_overhead(size, bandwidth, overhead, size / (factor * best)) for factor in (0.9, 1.0, 1.1)}
    assert at[1.0] < at[0.9] and at[1.0] < at[1.1]
    # Computing a bucket takes as long as sending it: exposed_communication then says nearly the same.
    n = round(size / best)
    link = cost.Link(overhead, bandwidth)  # of two devices: bus and algorithm bandwidth are one
    exposed = cost.exposed_communication([size / n] * n, link, 2, backward_s=size / bandwidth)
    assert exposed == pytest.approx(cost.ddp_overhead(size, bandwidth, overhead, n))


# --- Parallel feed-forward layers -----------------------------------------------------------------

LAYER = cost.FeedForward(d_model=4096, d_ff=11008)
DEVICE = cost.Accelerator(flops=8e14, bandwidth=3e11)
TOKENS = 50_000.0


def balance(n, compute, communicate):
    """Computation less communication on slightly fewer and slightly more than n devices."""
    return [compute(n * share) - communicate(n * share) for share in (0.999, 1.001)]


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_the_bounds_are_where_communication_overtakes_computation(which):
    def compute(n):
        return LAYER.compute_s(TOKENS, n, DEVICE, which)

    most = LAYER.most_data_parallel(TOKENS, DEVICE)
    before, after = balance(most, compute, lambda n: LAYER.weights_s(n, 1, DEVICE, which))
    assert before > 0 > after
    most = LAYER.most_tensor(DEVICE, which)
    before, after = balance(most, compute, lambda n: LAYER.activations_s(TOKENS, 1, n, DEVICE))
    assert before > 0 > after


@pytest.mark.parametrize("overlapped", [True, False])
def test_the_mixed_bound_is_the_best_of_all_meshes(overlapped):
    together = max if overlapped else lambda *times: sum(times)
    best = 0.0
    for step in range(1, 4000):
        fsdp = 1 + step * 0.1
        # The most that tensor parallelism can be at this fsdp, by bisection.
        low, high = 1.0, 1e4
        for _ in range(60):
            tensor = (low + high) / 2
            sent = together(LAYER.weights_s(fsdp, tensor, DEVICE), LAYER.activations_s(TOKENS, fsdp, tensor, DEVICE))
            low, high = (tensor, high) if LAYER.compute_s(TOKENS, fsdp * tensor, DEVICE) >= sent else (low, tensor)
        if low > 1.0:
            best = max(best, fsdp * low)
    assert LAYER.most_mixed(TOKENS, DEVICE, overlapped=overlapped) == pytest.approx(best, rel=0.01)


def test_the_accounting_of_xxl():
    xxl = cost.XXL
    assert xxl.parameters == 2 * 16_384 * 53_248 * 126
    assert xxl.state_bytes / 80e9 == pytest.approx(43.97, abs=0.01)
    for tokens in (0, 1024):
        n = xxl.devices_for(tokens, 95e9)
        assert xxl.device_bytes(tokens, n) < 95e9 <= xxl.device_bytes(tokens, n - 1)
    assert xxl.devices_for(100_000, 95e9) is None
    least = xxl.tokens_per_device(16, 4, cost.TPU_V5P, links=2)
    assert least == pytest.approx(4.6e14 / 1.8e11 / 2 / 4)
    assert xxl.tokens_per_device(16, 64, cost.TPU_V5P) is None  # the slices of a layer are too thin
    # The same from the times, whose (n - 1) / n is near 1 on many devices.
    fsdp = 4096
    for tokens, bound in ((0.98 * least, False), (1.02 * least, True)):
        batch = tokens * fsdp * 4
        doubled = cost.Accelerator(cost.TPU_V5P.flops, 2 * cost.TPU_V5P.bandwidth)
        assert (xxl.compute_s(batch, fsdp * 4, cost.TPU_V5P) >= xxl.weights_s(fsdp, 4, doubled)) == bound
