"""Writing text with a model: temperature, top-k, top-p (nucleus; Holtzman et al., arXiv 1904.09751, section 3.1), a
cache.

A prompt is read in one pass (prefill), which leaves its keys and values in the cache; then each new token reads itself
alone (decode). Several prompts are continued together, each as if it were alone. Without the cache, every new token
reads its whole window anew: the same tokens, several times slower.

A prompt is cut to its last context_length tokens. When a text outgrows context_length, its window is cut to its last
half, which is read anew at positions from 0, and grows again: positions are in the cached keys, so that a window that
slid by one token would have to be read anew for each.

Windows are padded to a power of two, which causal attention makes harmless, so that a kernel sees few shapes. Each text
has a generator of its own on the CPU: it does not touch the random state of training, and the same logits give the same
text on every device. The price is one wait for the device a token.

Legend: B texts, T tokens, H heads, D head_dim, d d_model, V vocabulary.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmsys.config import END_OF_TEXT, GenerateConfig, require

if TYPE_CHECKING:
    from lmsys.data.tokenizer import Tokenizer
    from lmsys.model import TransformerLM

_SHORTEST_WINDOW = 16  # tokens
# Tokens that hold the nucleus nearly always; a full sort of 50,304 takes 4 ms on a CPU core, this 0.1.
_LIKELIEST = 1024


# --- Sampling -------------------------------------------------------------------------------------


def next_token_probabilities(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """logits (V) -> probabilities (V) after temperature, then top-k, then top-p. Temperature 0: all on the largest.

    top_k: only the k largest remain (0: all). top_p: of these, the fewest whose probability adds up to at least top_p.
    FloatingPointError: a logit is NaN, or infinite and the largest.
    """
    logits = logits.float()
    largest = logits.max()
    if not largest.isfinite():
        raise FloatingPointError(f"the model's largest logit is {largest.item()}: its weights are damaged")
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    probabilities = ((logits - largest) / temperature).softmax(-1)
    top_k = top_k if top_k < len(logits) else 0
    if not top_k and top_p == 1:
        return probabilities
    kept, ids = probabilities.topk(top_k or min(_LIKELIEST, len(logits)))
    if not top_k and kept.sum() < top_p:
        kept, ids = probabilities.sort(descending=True, stable=True)
    if top_k:
        kept = kept / kept.sum()
    if top_p < 1:
        before = kept.cumsum(-1) - kept  # of the likelier tokens; 0 for the likeliest, which so always stays
        kept = kept.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, ids, kept / kept.sum())


def _draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """An index with its probability: one uniform number, and where it falls in the running sum."""
    upto = probabilities.cumsum(-1, dtype=torch.float64)
    place = torch.rand(1, generator=generator, dtype=torch.float64) * upto[-1]
    return int(torch.searchsorted(upto, place, right=True))  # right: never an index of probability 0


# --- The cache ------------------------------------------------------------------------------------


class KeyValueCache:
    """Keys and values of what B texts have been read, (layers, B, H, max_len, D) each, allocated at the first read.

    lengths: how many tokens each text has there. Places beyond are zeros or left over, and masked.
    cuda_graph: replay a step as one launch: a step of few texts is some forty small kernels a layer, whose launches
        take longer than their work. The recorded step reads all max_len places, as its shapes cannot change, and not
        under autocast, whose casts of the weights it would repeat.
    """

    def __init__(self, model: TransformerLM, batch: int, max_len: int, *, cuda_graph: bool = False):
        self.model, self.max_len, self.cuda_graph = model, max_len, cuda_graph
        self.device = model.token_embeddings.weight.device
        require(
            not cuda_graph or (self.device.type == "cuda" and not torch.is_autocast_enabled("cuda")),
            f"a CUDA graph is for a model on a CUDA GPU without autocast; this one is on {self.device}: leave it out",
        )
        self.keys = self.values = torch.empty(0)
        self._hold([0] * batch)

    def _hold(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self._rows = torch.arange(len(lengths), device=self.device)
        self._inputs = torch.zeros(2, len(lengths), dtype=torch.int64, device=self.device)  # tokens, their positions
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def read(self, rows: Sequence[int], windows: Sequence[Sequence[int]]) -> Tensor:
        """Forget texts `rows`, read their windows in one pass: what the head reads after each last token, (R, d)."""
        index = torch.tensor(rows, device=self.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
            if not self.keys.numel():  # only now is the dtype known that the model computes keys in
                shape = len(self.model.layers), len(self.lengths), k.shape[1], self.max_len, k.shape[-1]
                self.keys, self.values = k.new_zeros(shape), v.new_zeros(shape)
            self.keys[layer, index, :, : k.shape[2]] = k
            self.values[layer, index, :, : v.shape[2]] = v
            return self.model.layers[layer].attn.attend(q, k, v, causal)

        hidden = _read(self.model, windows, attend)
        for row, window in zip(rows, windows, strict=True):
            self.lengths[row] = len(window)
        return hidden

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read one more token of each text: what the head reads after it, (B, d), until the next step."""
        self._inputs.copy_(torch.tensor([tokens, self.lengths]))
        if self.cuda_graph:
            graph, hidden = self._recorded = self._recorded or self._record()
            graph.replay()
        else:
            hidden = self._step(max(self.lengths) + 1)
        self.lengths = [length + 1 for length in self.lengths]
        return hidden

    def _step(self, span: int) -> Tensor:
        """Read _inputs, with the first `span` places of the cache in sight. Done twice, it leaves the same as once."""
        tokens, positions = self._inputs
        beyond = (torch.arange(span, device=self.device) > positions[:, None])[:, None, None]  # (B, 1, 1, span)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[self._rows, :, positions] = k[:, :, 0]
            values[self._rows, :, positions] = v[:, :, 0]
            scores = q * q.shape[-1] ** -0.5 @ keys[:, :, :span].transpose(-2, -1)  # (B, H, 1, span)
            return scores.masked_fill(beyond, -torch.inf).softmax(-1).to(values.dtype) @ values[:, :, :span]

        return self.model.hidden(tokens[:, None], positions=positions[:, None], attend=attend)[:, 0]

    def _record(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """(the graph of a step, where it leaves its result)."""
        with torch.cuda.device(self.device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):  # first calls load kernels and make workspaces, which cannot be recorded
                    self._step(self.max_len)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                hidden = self._step(self.max_len)
        return graph, hidden

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all texts but `rows`."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self._hold([self.lengths[row] for row in rows])


def _padded(length: int, context_length: int) -> int:
    return min(max(_SHORTEST_WINDOW, 1 << (length - 1).bit_length()), context_length)


def _read(
    model: TransformerLM, windows: Sequence[Sequence[int]], attend: Callable[..., Tensor] | None = None
) -> Tensor:
    """Read windows of token ids from position 0: what the head reads after each one's last token, (B, d)."""
    device = model.token_embeddings.weight.device
    lengths = [len(window) for window in windows]
    padded = torch.zeros(len(windows), _padded(max(lengths), model.config.context_length), dtype=torch.int64)
    for row, window in zip(padded, windows, strict=True):
        row[: len(window)] = torch.tensor(window)
    hidden = model.hidden(padded.to(device), attend=attend)
    return hidden[torch.arange(len(windows), device=device), torch.tensor(lengths, device=device) - 1]


# --- Generation -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generation:
    """What generate_batch() did. Prefill ends with the first logits; decode is all that follows."""

    tokens: list[list[int]]  # the new ids of each prompt, without stop_id
    prefill_tokens: int
    prefill_s: float
    decode_tokens: int  # those that a step gave logits for: over all prompts, without each one's first
    decode_s: float

    def speed(self) -> str:
        """Tokens a second of both, in one line."""
        parts = (("prefill", self.prefill_tokens, self.prefill_s), ("decode", self.decode_tokens, self.decode_s))
        return "; ".join(f"{name}: {count:,} tokens, {count / max(s, 1e-9):,.0f} tokens/s" for name, count, s in parts)


@torch.no_grad()
def generate_batch(
    model: TransformerLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_id: int | None = None,
    vocab_size: int | None = None,
    use_cache: bool = True,
    cuda_graph: bool = False,
    on_token: Callable[[int, int | None], None] | None = None,
) -> Generation:
    """Continue sequences of token ids together, each up to stop_id or max_new_tokens.

    Args:
        seed: of each text's own generator.
        vocab_size: sample only ids below it, for a model whose vocabulary is padded beyond its tokenizer's.
        use_cache: False reads each window anew for every token. cuda_graph: see KeyValueCache.
        on_token: called with the index of a prompt and its new id, as soon as it is drawn; with None at its end.
    """
    context_length = model.config.context_length
    windows = [_checked(prompt, model.config.vocab_size)[-context_length:] for prompt in prompts]
    require(bool(windows), "there are no prompts; give at least one")
    require(max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    longest = max(map(len, windows))
    room = min(context_length, max(_padded(longest, context_length), longest + max_new_tokens - 1))
    cache = KeyValueCache(model, len(windows), room, cuda_graph=cuda_graph) if use_cache else None
    generators = [torch.Generator().manual_seed(seed) for _ in windows]
    new: list[list[int]] = [[] for _ in windows]
    active = list(range(len(windows)))  # those that are not at their end, in the order of the cache's rows
    on_token = on_token or (lambda index, token: None)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    decode_tokens = 0

    def logits_of(hidden: Tensor) -> Tensor:
        return model.logits(hidden)[:, :vocab_size].float().cpu()

    # A compiled block would be compiled anew for these shapes; the uncompiled one is faster for so few tokens.
    with torch.compiler.set_stance("force_eager") if model.compiled else nullcontext():
        start = time.perf_counter()
        logits = logits_of(cache.read(active, windows) if cache else _read(model, windows))
        prefilled = time.perf_counter()
        while True:
            going_on = []  # places in active
            for place, index in enumerate(active):
                token = _draw(next_token_probabilities(logits[place], **sampling), generators[index])
                if token != stop_id:
                    new[index].append(token)
                    windows[index].append(token)
                    on_token(index, token)
                if token == stop_id or len(new[index]) == max_new_tokens:
                    on_token(index, None)
                else:
                    going_on.append(place)
            if not going_on:
                break
            if cache and len(going_on) < len(active):
                cache.keep(going_on)
            active = [active[place] for place in going_on]
            full = [place for place, index in enumerate(active) if len(windows[index]) > context_length]
            for place in full:
                del windows[active[place]][: -((context_length + 1) // 2)]
            if cache and full:
                cache.read(full, [windows[active[place]][:-1] for place in full])
            texts = [windows[index] for index in active]
            logits = logits_of(cache.step([text[-1] for text in texts]) if cache else _read(model, texts))
            decode_tokens += len(active)
    ended = time.perf_counter()
    prefill_tokens = sum(min(len(prompt), context_length) for prompt in prompts)
    return Generation(new, prefill_tokens, prefilled - start, decode_tokens, ended - prefilled)


def _checked(prompt: Sequence[int], vocab_size: int) -> list[int]:
    ids = list(prompt)
    require(bool(ids), "the prompt has no tokens; give at least one")
    what = f"the prompt has token ids from {min(ids)} to {max(ids)}, outside the model's vocabulary of {vocab_size}"
    fits = min(ids) >= 0 and max(ids) < vocab_size
    require(fits, f"{what}; use the tokenizer that the model was trained with")
    return ids


def generate(model: TransformerLM, ids: Sequence[int], **settings) -> list[int]:
    """generate_batch for one sequence of token ids. Returns the new ids, without the prompt and stop_id."""
    return generate_batch(model, [ids], **settings).tokens[0]


# --- Text -----------------------------------------------------------------------------------------


def generate_texts(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: GenerateConfig,
    *,
    use_cache: bool = True,
    cuda_graph: bool = False,
    write: Callable[[str], None] | None = None,
) -> tuple[list[str], Generation]:
    """The prompts and their continuations up to <|endoftext|>. An empty prompt starts at <|endoftext|>, as a text does.

    Args:
        write: called with the texts piece by piece as they are written: one text after the other, a blank line after
            each. A piece ends at a whole character; bytes that are not UTF-8 become U+FFFD.
    """
    end = tokenizer.encode(END_OF_TEXT)
    message = f"the tokenizer has no special token {END_OF_TEXT}, with which texts end; give one that has it"
    require(len(end) == 1, message)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    options = {name: getattr(config, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    options |= {"stop_id": end[0], "vocab_size": tokenizer.vocab_size}
    options |= {"use_cache": use_cache, "cuda_graph": cuda_graph}
    options["on_token"] = _InOrder(tokenizer, prompts, write) if write else None
    written = generate_batch(model, [one or end for one in ids], **options)
    return [tokenizer.decode(one + new) for one, new in zip(ids, written.tokens, strict=True)], written


def generate_text(model: TransformerLM, tokenizer: Tokenizer, prompt: str, config: GenerateConfig) -> str:
    """generate_texts for one prompt."""
    return generate_texts(model, tokenizer, [prompt], config)[0][0]


class _InOrder:
    """on_token for texts that grow at once and are read one after the other: what comes early waits for its turn."""

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[str], write: Callable[[str], None]):
        self._tokenizer, self._write = tokenizer, write
        self._decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in prompts]
        self._waiting = list(prompts)
        self._ended = [False] * len(prompts)
        self._turn = 0
        self._flush()

    def __call__(self, index: int, token: int | None) -> None:
        data = b"" if token is None else self._tokenizer.vocab.get(token)
        message = f"token id {token} is not in the tokenizer's vocabulary; give the model's own tokenizer"
        require(data is not None, message)
        self._waiting[index] += self._decoders[index].decode(data, final=token is None)
        if token is None:
            self._waiting[index] += "\n\n"
            self._ended[index] = True
        self._flush()

    def _flush(self) -> None:
        while self._turn < len(self._waiting):
            if self._waiting[self._turn]:
                self._write(self._waiting[self._turn])
                self._waiting[self._turn] = ""
            if not self._ended[self._turn]:
                return
            self._turn += 1
