"""Sampling text from a model: temperature, top-k, and top-p (nucleus; Holtzman et al., arXiv 1904.09751, section 3.1).

Each new token reads the last context_length tokens anew: there is no key-value cache. The window is padded to a power of
two, which causal attention makes harmless, so that a kernel sees few shapes. Sampling uses a generator of its own on
the CPU: it does not touch the random state of training, and the same logits give the same text on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmsys.config import END_OF_TEXT, GenerateConfig

if TYPE_CHECKING:
    from lmsys.model import TransformerLM
    from lmsys.tokenizer import Tokenizer

_SHORTEST_WINDOW = 16  # tokens


def next_token_probabilities(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """logits (V) -> probabilities (V) after temperature, then top-k, then top-p. Temperature 0: all on the largest.

    top_k: only the k largest remain (0: all). top_p: of these, the fewest whose probability adds up to at least top_p.
    """
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    ordered, ids = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[top_k:] = -torch.inf
    kept = ordered.softmax(-1)
    if top_p < 1:
        before = kept.cumsum(-1) - kept  # of the likelier tokens; 0 for the likeliest, which so always stays
        kept = kept.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(kept).scatter_(-1, ids, kept / kept.sum())


@torch.no_grad()
def generate(
    model: TransformerLM,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_id: int | None = None,
    vocab_size: int | None = None,
) -> list[int]:
    """Continue a sequence of token ids. Returns the new ids alone, without the prompt and without stop_id.

    vocab_size: sample only ids below it, for a model whose vocabulary is padded beyond its tokenizer's.

    Raises:
        ValueError: no ids, or one outside the model's vocabulary.
    """
    context_length = model.config.context_length
    window = list(ids)
    if not window:
        raise ValueError("the prompt has no tokens; give at least one")
    if min(window) < 0 or max(window) >= model.config.vocab_size:
        raise ValueError(
            f"the prompt has token ids from {min(window)} to {max(window)}, outside the model's vocabulary of "
            f"{model.config.vocab_size}; use the tokenizer that the model was trained with"
        )
    device = model.token_embeddings.weight.device
    generator = torch.Generator().manual_seed(seed)
    new: list[int] = []
    # A compiled block would be compiled anew for these shapes; the uncompiled one is faster for so few tokens.
    with torch.compiler.set_stance("force_eager") if model.compiled else nullcontext():
        while len(new) < max_new_tokens:
            window = window[-context_length:]
            length = max(_SHORTEST_WINDOW, 1 << (len(window) - 1).bit_length())
            padded = torch.zeros(1, min(length, context_length), dtype=torch.int64)
            padded[0, : len(window)] = torch.tensor(window)
            hidden = model.hidden(padded.to(device))[0, len(window) - 1]
            logits = model.logits(hidden)[:vocab_size].float().cpu()
            probabilities = next_token_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
            token = int(torch.multinomial(probabilities, 1, generator=generator))
            if token == stop_id:
                break
            new.append(token)
            window.append(token)
    return new


def generate_text(model: TransformerLM, tokenizer: Tokenizer, prompt: str, config: GenerateConfig) -> str:
    """The prompt and its continuation up to <|endoftext|>. An empty prompt starts at <|endoftext|>, as a new text does.

    Raises:
        ValueError: the tokenizer is not the model's.
    """
    (end,) = tokenizer.encode(END_OF_TEXT)
    ids = tokenizer.encode(prompt)
    new = generate(
        model,
        ids or [end],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        stop_id=end,
        vocab_size=tokenizer.vocab_size,
    )
    return tokenizer.decode(ids + new)
