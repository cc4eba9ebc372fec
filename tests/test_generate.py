"""Sampling: its filters on known distributions, its determinism, its limits. The cache: the same tokens without it."""

import pytest
import torch

from lmsys.config import END_OF_TEXT, GenerateConfig, ModelConfig
from lmsys.data.tokenizer import Tokenizer
from lmsys.generate import (
    KeyValueCache,
    generate,
    generate_batch,
    generate_text,
    generate_texts,
    next_token_probabilities,
)
from lmsys.model import TransformerLM


class ByteTokenizer:
    """A byte a token, and <|endoftext|> as id 256."""

    vocab_size = 257

    def encode(self, text: str) -> list[int]:
        return [256] if text == "<|endoftext|>" else list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return b"".join(b"<|endoftext|>" if i == 256 else bytes([i]) for i in ids).decode(errors="replace")


@pytest.fixture(scope="module")
def model() -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(ModelConfig(16, 32, 1, 2, 20, 260))


@pytest.mark.parametrize("prompt", [3, 20, 27])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_is_the_largest_logit_of_the_documented_window(model, prompt, use_cache):
    ids = list(range(1, prompt + 1))
    new = generate(model, ids, max_new_tokens=40, temperature=0, use_cache=use_cache)
    assert len(new) == 40
    window = ids[-20:]
    for token in new:
        if len(window) > 20:  # the context length: the last half goes on
            window = window[-10:]
        assert token == model(torch.tensor([window]))[0, -1].argmax()
        window.append(token)
    assert new == generate(model, ids, max_new_tokens=40, temperature=0, seed=7, use_cache=use_cache)


@pytest.mark.parametrize("context_length", [1, 2, 7, 20, 64])
def test_the_cache_changes_no_token(context_length):
    torch.manual_seed(1)
    model = TransformerLM(ModelConfig(32, 48, 3, 4, context_length, 90, tie_embeddings=True))
    for seed, prompt in enumerate(([4], [7, 8, 9], list(range(25)))):
        settings = {"max_new_tokens": 50, "temperature": 1.3, "top_p": 0.95, "seed": seed}
        assert generate(model, prompt, **settings) == generate(model, prompt, use_cache=False, **settings)


def test_texts_that_are_written_together_are_those_written_alone(model):
    prompts = [[5], [1, 2, 3], list(range(18)), list(range(30)), [1, 2, 3]]
    settings = {"max_new_tokens": 45, "top_k": 40, "seed": 3}
    alone = [generate(model, prompt, **settings) for prompt in prompts]
    stop = alone[1][6]  # some end early, and leave the cache
    alone = [new[: new.index(stop)] if stop in new else new for new in alone]
    assert len({len(new) for new in alone}) > 1
    for use_cache in (True, False):
        events = [[] for _ in prompts]
        together = generate_batch(
            model,
            prompts,
            stop_id=stop,
            use_cache=use_cache,
            on_token=lambda index, token, events=events: events[index].append(token),
            **settings,
        )
        assert together.tokens == alone
        assert events == [[*new, None] for new in alone]
        assert together.prefill_tokens == 1 + 3 + 18 + 20 + 3
        assert together.decode_tokens == sum(len(new) + (len(new) < 45) - 1 for new in alone)
        assert together.prefill_s > 0 and together.decode_s > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_gives_the_logits_of_the_whole_text(dtype):
    torch.manual_seed(2)
    model = TransformerLM(ModelConfig(32, 48, 2, 4, 40, 90)).to(dtype)
    texts = torch.randint(90, (3, 40)).tolist()
    starts = [5, 17, 2]
    with torch.no_grad():
        cache = KeyValueCache(model, 3, 40)
        hidden = cache.read([0, 1, 2], [text[:start] for text, start in zip(texts, starts, strict=True)])
        place = cache.keys.data_ptr()
        assert cache.keys.shape == cache.values.shape == (2, 3, 4, 40, 8) and cache.keys.dtype == dtype
        for more in range(23):
            for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
                expected = model.hidden(torch.tensor([text[: start + more]]))[0, -1]
                torch.testing.assert_close(hidden[row], expected, rtol=1e-5, atol=1e-6 if dtype.itemsize == 8 else 1e-5)
            hidden = cache.step([text[start + more] for text, start in zip(texts, starts, strict=True)])
        assert cache.keys.data_ptr() == place
        cache.keep([2, 0])
        hidden = cache.step([1, 2])
        for row, (text, start, last) in enumerate(((texts[2], 2, 1), (texts[0], 5, 2))):
            torch.testing.assert_close(hidden[row], model.hidden(torch.tensor([[*text[: start + 23], last]]))[0, -1])


def test_a_step_may_see_the_whole_cache(model):
    """As its CUDA graph does: what is beyond a text changes nothing, nor does a second go."""
    with torch.no_grad():
        cache = KeyValueCache(model, 2, 20)
        cache.read([0, 1], [[1, 2, 3], [4]])
        short = cache.step([5, 6])
        before = cache.keys.clone(), cache.values.clone()
        for _ in range(2):
            torch.testing.assert_close(cache._step(20), short)
        assert torch.equal(cache.keys, before[0]) and torch.equal(cache.values, before[1])
    with pytest.raises(
        ValueError, match="a CUDA graph is for a model on a CUDA GPU without autocast; this one is on cpu"
    ):
        generate(model, [1], max_new_tokens=1, cuda_graph=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_recorded_step_changes_no_token():
    torch.manual_seed(1)
    model = TransformerLM(ModelConfig(64, 96, 3, 4, 32, 90)).cuda().double()
    prompts = [[4], [7, 8, 9], list(range(40)), [1]]
    for stop in (None, 5):
        settings = {"max_new_tokens": 80, "temperature": 1.3, "seed": 2, "stop_id": stop}
        expected = generate_batch(model, prompts, use_cache=False, **settings).tokens
        for cuda_graph in (False, True):
            assert generate_batch(model, prompts, cuda_graph=cuda_graph, **settings).tokens == expected


def test_a_cached_token_is_read_once(model, monkeypatch):
    read = []
    embed = model.token_embeddings.forward
    monkeypatch.setattr(model.token_embeddings, "forward", lambda ids: (read.append(tuple(ids.shape)), embed(ids))[1])
    generate(model, [1, 2, 3], max_new_tokens=17)
    assert read == [(1, 16)] + [(1, 1)] * 16
    read.clear()
    generate(model, [1, 2, 3], max_new_tokens=22)  # 3 + 18 tokens: cut once, to 10 of which 9 are read anew
    assert read == [(1, 16)] + [(1, 1)] * 17 + [(1, 16)] + [(1, 1)] * 4


def test_under_autocast_the_cache_is_bf16(model):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cache = KeyValueCache(model, 1, 20)
        cache.read([0], [[1, 2, 3]])
        hidden = cache.step([4])
        expected = model.hidden(torch.tensor([[1, 2, 3, 4]]))[:, -1]
    assert cache.keys.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.float(), expected.float(), rtol=0.05, atol=0.05)


def test_a_seed_gives_one_text_and_leaves_the_random_state(model):
    before = torch.get_rng_state()
    one = generate(model, [5], max_new_tokens=30, seed=1)
    assert one == generate(model, [5], max_new_tokens=30, seed=1)
    assert one != generate(model, [5], max_new_tokens=30, seed=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_filters_keep_what_they_say():
    logits = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))

    def probabilities(**settings):
        return next_token_probabilities(logits, **settings).tolist()

    assert probabilities() == pytest.approx([0.1, 0.4, 0.2, 0.3])
    assert probabilities(top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7])
    assert probabilities(top_p=0.69) == pytest.approx([0, 4 / 7, 0, 3 / 7])
    assert probabilities(top_p=0.75) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9])
    assert probabilities(top_p=0.01) == [0, 1, 0, 0]
    assert probabilities(top_k=3, top_p=0.5) == pytest.approx([0, 4 / 7, 0, 3 / 7])  # 4/9 of the three is below 0.5
    assert probabilities(top_k=100) == pytest.approx([0.1, 0.4, 0.2, 0.3])
    assert probabilities(temperature=0) == [0, 1, 0, 0]
    assert probabilities(temperature=1e-30) == [0, 1, 0, 0]
    squared = torch.tensor([0.01, 0.16, 0.04, 0.09])
    assert probabilities(temperature=0.5) == pytest.approx((squared / squared.sum()).tolist())


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_k": 2000, "top_p": 0.9}, {"top_k": 50}])
def test_filters_of_a_large_vocabulary_are_those_of_a_full_sort(spread, filters):
    logits = spread * torch.randn(5000, generator=torch.Generator().manual_seed(0))
    kept, order = logits.sort(descending=True)
    count = filters.get("top_k", 5000)
    share = kept[:count].double().softmax(-1)
    inside = share.cumsum(-1) - share < filters.get("top_p", 2) - 1e-6
    found = next_token_probabilities(logits, **filters)
    assert abs(int((found > 0).sum()) - int(inside.sum())) <= 1  # the last one may go either way by rounding
    if spread:  # else all are tied
        expected = torch.zeros(5000).scatter_(0, order[:count], (share * inside / share[inside].sum()).float())
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6 + 2 * float(share[inside][-1]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error(bad):
    with pytest.raises(FloatingPointError, match="largest logit is (nan|inf)"):
        next_token_probabilities(torch.tensor([0.0, bad]))


def test_samples_follow_the_distribution(model):
    probabilities = next_token_probabilities(model(torch.tensor([[7]]))[0, -1].detach(), top_k=3)
    draws = [generate(model, [7], max_new_tokens=1, top_k=3, seed=seed)[0] for seed in range(400)]
    assert set(draws) <= set(probabilities.nonzero().flatten().tolist())
    for token in set(draws):
        assert draws.count(token) / 400 == pytest.approx(probabilities[token].item(), abs=0.1)


def test_stops_at_the_end_token(model):
    greedy = generate(model, [1, 2, 3], max_new_tokens=10, temperature=0)
    stop = greedy[4]
    assert generate(model, [1, 2, 3], max_new_tokens=10, temperature=0, stop_id=stop) == greedy[: greedy.index(stop)]


def test_text_begins_with_its_prompt(model):
    config = GenerateConfig(max_new_tokens=12, seed=3)
    tokenizer = ByteTokenizer()
    text = generate_text(model, tokenizer, "Héllo", config)
    assert text.startswith("Héllo") and len(text) > 5
    assert generate_text(model, tokenizer, "", config)  # an empty prompt starts a new text
    ids = [generate(model, [1], max_new_tokens=50, seed=seed, vocab_size=100) for seed in range(3)]
    assert max(map(max, ids)) < 100


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    return Tokenizer({byte: bytes([byte]) for byte in range(256)}, [], [END_OF_TEXT])


def test_streamed_pieces_are_the_texts_in_whole_characters(model, byte_tokenizer, monkeypatch):
    """Of texts written at once, each follows the one before it; é, a euro sign and an emoji come byte by byte."""
    one, two = "é€😀!".encode(), b"b\xf0\x9f\x98"  # the second one ends inside a character

    def written(model, prompts, *, on_token, **_):
        for step in range(len(one) + 1):
            for index, data in ((1, two), (0, one)):
                if step <= len(data):
                    on_token(index, data[step] if step < len(data) else None)
        return generate_batch(model, prompts, max_new_tokens=1)

    monkeypatch.setattr("lmsys.generate.generate_batch", written)
    pieces = []
    generate_texts(model, byte_tokenizer, ["Hé", "a"], GenerateConfig(), write=pieces.append)
    assert pieces == ["Hé", "é", "€", "😀", "!", "\n\n", "ab\ufffd\n\n"]


def test_streamed_texts_are_those_returned(model, byte_tokenizer):
    pieces = []
    prompts = ["", "Once é", "Once é", "x" * 40]
    texts, written = generate_texts(
        model, byte_tokenizer, prompts, GenerateConfig(max_new_tokens=60, temperature=1.2), write=pieces.append
    )
    assert "".join(pieces) == "".join(text + "\n\n" for text in texts) and len(pieces) > 20
    assert (
        texts[1]
        == texts[2]
        == generate_text(model, byte_tokenizer, "Once é", GenerateConfig(max_new_tokens=60, temperature=1.2))
    )
    assert written.prefill_tokens == 1 + 7 + 7 + 20
    plain = Tokenizer({byte: bytes([byte]) for byte in range(256)}, [])
    with pytest.raises(ValueError, match=r"no special token <\|endoftext\|>"):
        generate_texts(model, plain, ["x"], GenerateConfig())


def test_bad_prompts_are_named(model):
    with pytest.raises(ValueError, match="no tokens"):
        generate(model, [], max_new_tokens=1)
    with pytest.raises(ValueError, match="from 3 to 260, outside the model's vocabulary of 260"):
        generate(model, [3, 260], max_new_tokens=1)
    with pytest.raises(ValueError, match="no prompts"):
        generate_batch(model, [], max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generate(model, [3], max_new_tokens=0)


def test_a_compiled_model_generates_uncompiled():
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(16, 32, 1, 2, 20, 50))
    expected = generate(model, [1], max_new_tokens=5)

    def refuse(*_):
        raise AssertionError("compiled")

    model.compile_blocks(backend=refuse)
    assert generate(model, [1], max_new_tokens=5) == expected
