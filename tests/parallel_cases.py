"""What tests of several processes share: a small module with every kind of parameter, batches, the unsharded twin.

A test's oracle is the twin: the same module trained by one process on the whole batch. Functions here are importable
by name, as lmsys.parallel.group.spawn needs. Legend: B sequences a batch over all processes, T tokens a sequence.
"""

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, BLOCKS = 23, 16, 3
B, T = 12, 5  # B is a multiple of 1, 2, 3, 4 and 6 processes
STEPS = 5
TIME_LIMIT_S = 100.0  # of a spawn, generous because CI's cores are few


class Block(nn.Module):
    """A residual block with two matrices and a norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Toy(nn.Module):
    """Next-token logits of tokens: (B, T) int64 -> (B, T, VOCABULARY).

    Parameters: the head is tied to the embedding, blocks[1].up.weight is frozen, `unused` takes part in no forward
    pass, and `sometimes` only where the first token of the share is even, so that it may be used on one rank alone.
    Buffer: scale, which the logits are multiplied with.
    """

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.unused = nn.Linear(WIDTH, 3)
        self.sometimes = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.blocks[1].up.weight.requires_grad_(False)
        self.register_buffer("scale", torch.full((), 1.5))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        if tokens[0, 0] % 2 == 0:
            x = x + self.sometimes(x)
        return self.head(x) * self.scale


def toy(seed: int = 0) -> Toy:
    """A Toy with the parameters of a seed."""
    torch.manual_seed(seed)
    return Toy()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets of a step, (B, T) each, the same in every process.

    The first tokens of the sequences alternate in parity with the step and the half of the batch, so that with two
    processes `sometimes` is used on rank 0 in even steps and on rank 1 in odd ones.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    tokens, targets = torch.randint(0, VOCABULARY - 1, (2, B, T), generator=generator).unbind()
    halves = torch.arange(B) // (B // 2)
    tokens[:, 0] = tokens[:, 0] // 2 * 2 + (halves + step) % 2
    return tokens, targets


def share(tensor: Tensor, rank: int, world_size: int) -> Tensor:
    """A rank's part of a batch: (B / world_size, T)."""
    return tensor.chunk(world_size)[rank]


def loss(module: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy over the tokens."""
    return nn.functional.cross_entropy(module(tokens).flatten(0, 1), targets.flatten())


def twin_loss(module: nn.Module, step: int, world_size: int) -> Tensor:
    """The loss of a step on the whole batch: the mean over the shares, each of which may use `sometimes` or not."""
    tokens, targets = batch(step)
    losses = [loss(module, share(tokens, r, world_size), share(targets, r, world_size)) for r in range(world_size)]
    return torch.stack(losses).mean()


def sgd(parameters) -> torch.optim.Optimizer:
    """The optimizer that shows an error of the gradients as one of the parameters, of the same size."""
    return torch.optim.SGD(parameters, lr=0.05)


def twin(world_size: int, steps: int = STEPS, optimizer=sgd, seed: int = 0, max_norm: float | None = None) -> Toy:
    """The Toy of the seed after some steps in this process alone, on the whole batches."""
    module = toy(seed)
    optimizer = optimizer([p for p in module.parameters() if p.requires_grad])
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        twin_loss(module, step, world_size).backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(module.parameters(), max_norm)
        optimizer.step()
    return module


def difference(module: nn.Module, expected: nn.Module) -> float:
    """The largest absolute difference between the parameters of two modules of one shape."""
    ours, theirs = dict(module.named_parameters()), dict(expected.named_parameters())
    assert ours.keys() == theirs.keys()
    return max((ours[name].float() - theirs[name].float()).abs().max().item() for name in ours)


def same(ours, theirs) -> bool:
    """Whether two nests of dictionaries, lists and tensors are equal, bit for bit."""
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return torch.equal(ours, theirs) if isinstance(theirs, Tensor) else ours == theirs
