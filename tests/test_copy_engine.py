"""The copy engines' protocol, in processes that share a file instead of GPUs' memory, against means in float64."""

import functools
import random
import time

import pytest
import torch
import torch.distributed as dist
from parallel_cases import TIME_LIMIT_S, difference, sgd, share, toy, twin
from parallel_cases import batch as toy_batch
from parallel_cases import loss as toy_loss
from shared_fabric import engine

from lmsys.parallel import ddp, wrap
from lmsys.parallel.copy_engine import CopyEngine, Range, pieces
from lmsys.parallel.group import spawn

SHAPES = [[(3, 5), (70,), ()], [(1,)], [(40, 50), (7,), (333,)], [(128, 64)]]
PIECE_MB = 0.004  # the largest case takes 9 pieces of two ranks


def test_pieces_hold_every_element_once_and_no_chunk_is_too_long():
    for sizes, world_size, chunk in [
        ((15, 70, 1), 2, 64),
        ((1,), 3, 64),
        ((2000, 7, 333), 4, 128),
        ((1 << 20,), 2, 4096),
    ]:
        seen = [torch.zeros(size, dtype=torch.int64) for size in sizes]
        for piece in pieces(sizes, world_size, chunk):
            assert len(piece) == world_size
            for ranges in piece:
                filled = 0
                for part in ranges:
                    assert part.offset == filled
                    filled += part.stop - part.start
                    seen[part.tensor][part.start : part.stop] += 1
                assert filled <= chunk
        assert all(bool((count == 1).all()) for count in seen)


def test_pieces_are_even():
    """A bucket a little larger than a piece travels as two halves, not as a piece and a rest."""
    (first, second) = pieces((1000,), 2, 448)
    assert first == ((Range(0, 0, 256, 0),), (Range(0, 256, 512, 0),))
    assert second == ((Range(0, 512, 768, 0),), (Range(0, 768, 1000, 0),))


def averages(process, folder):
    """For some rounds over SHAPES and dtypes: the largest error against float64, and a checksum of the bits."""
    engine_ = engine(folder, piece_mb=PIECE_MB, slots=3)
    rng = random.Random(process.rank)
    engine_._fabric.delay = lambda: time.sleep(rng.choice((0.0, 0.0, 0.0005)))
    errors, bits, rounds = {}, [], 0
    rng_of_all = random.Random(0)
    for turn in range(6):
        for index, shapes in enumerate(SHAPES):
            for dtype in (torch.float32, torch.bfloat16):
                given = [
                    [
                        torch.randn(shape, generator=torch.Generator().manual_seed(100 * turn + 10 * index + rank)).to(
                            dtype
                        )
                        for shape in shapes
                    ]
                    for rank in range(process.world_size)
                ]
                tensors = given[process.rank]
                wanted = [torch.stack([t.double() for t in same]).mean(0) for same in zip(*given, strict=True)]
                engine_.average(tensors).wait()
                error = max((a.double() - b).abs().max().item() for a, b in zip(tensors, wanted, strict=True))
                errors[str(dtype)] = max(errors.get(str(dtype), 0.0), error)
                if rng_of_all.random() < 0.4:
                    engine_.close().wait()
                    assert not engine_._fabric.unjoined
                    engine_._fabric.started.clear()
                    rounds += 1
                bits.append(hash(tuple(float(x) for t in tensors for x in t.reshape(-1)[:50])))
    return errors, bits, rounds


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_has_the_same_mean(ranks, tmp_path):
    results = spawn(averages, ranks, str(tmp_path), device="cpu", timeout_s=TIME_LIMIT_S)
    assert all(bits == results[0][1] and rounds > 5 for _, bits, rounds in results)
    for errors, _, _ in results:
        assert errors["torch.float32"] < 1e-6 and errors["torch.bfloat16"] < 0.03


def under_flashddp(process, folder):
    """The toy after 5 steps whose gradients a file carried, unused and frozen parameters among them, and the twin."""
    made = []

    def make(device, piece_mb):
        assert piece_mb == pytest.approx(sum(p.nbytes for p in module.parameters() if p.requires_grad) / 1e6)
        made.append(engine(folder, piece_mb=PIECE_MB, slots=2))
        return made[-1]

    ddp.CopyEngine = make
    module = toy(seed=process.rank)
    wrapped = wrap(module, "flashddp", bucket_size_mb=0.003, transport="copy_engine")
    optimizer = sgd([p for p in module.parameters() if p.requires_grad])
    for step in range(5):
        optimizer.zero_grad(set_to_none=True)
        toy_loss(wrapped, *(share(tensor, process.rank, process.world_size) for tensor in toy_batch(step))).backward()
        wrapped.finish_gradient_synchronization()
        optimizer.step()
    return (
        difference(module, twin(process.world_size)),
        len(made[0]._passes),
        wrapped.extra_bytes == made[0].memory_bytes,
    )


def test_flashddp_trains_as_the_twin(tmp_path):
    for found, passed, counted in spawn(under_flashddp, 2, str(tmp_path), device="cpu", timeout_s=TIME_LIMIT_S):
        assert found < 2e-6 and passed >= 5 and counted


def refused(process):
    found = []
    for make in (
        lambda: CopyEngine(torch.device("cpu")),
        lambda: CopyEngine(torch.device("cpu"), piece_mb=0),
        lambda: wrap(toy(), "flashddp", transport="pigeon"),
    ):
        with pytest.raises(ValueError) as error:
            make()
        found.append(str(error.value))
    return found


def test_bad_settings_are_refused_with_what_to_do():
    messages = spawn(refused, 2, device="cpu", timeout_s=TIME_LIMIT_S)[0]
    assert "the parameters are on cpu; give transport='nccl'" in messages[0]
    assert "piece_mb is 0" in messages[1]
    assert "transport is 'pigeon'; it must be auto or nccl or copy_engine" in messages[2]


# --- On GPUs --------------------------------------------------------------------------------------


def on_links(process):
    """The mean of tensors of every size and dtype by the GPUs' links, beside NCCL's; 20 rounds under a compute load."""
    copies = CopyEngine(process.device, piece_mb=1, slots=2)
    load = torch.randn(2048, 2048, device=process.device)
    worst = 0.0
    for turn in range(20):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            generator = torch.Generator(process.device).manual_seed(10 * turn + process.rank)
            make = functools.partial(torch.randn, generator=generator, device=process.device)
            tensors = [make(size).to(dtype) for size in (1, 1000, 1_234_567, 77)]
            wanted = [tensor.double() for tensor in tensors]
            for tensor in wanted:
                dist.all_reduce(tensor, op=dist.ReduceOp.AVG)
            if process.rank == turn % process.world_size:
                for _ in range(10):
                    load @ load
            work = copies.average(tensors)
            work.wait()
            copies.close().wait()
            eps = torch.finfo(dtype).eps
            worst = max(
                worst, *(((a.double() - b).abs().max() / eps).item() for a, b in zip(tensors, wanted, strict=True))
            )
    return worst


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpus_average_by_their_copy_engines():
    for worst in spawn(on_links, 2, device="cuda", timeout_s=TIME_LIMIT_S):
        assert worst < 8  # units in the last place of values up to about 5
