"""Sampling: its filters on known distributions, its determinism, its limits."""

import pytest
import torch

from lmsys.config import GenerateConfig, ModelConfig
from lmsys.generate import generate, generate_text, next_token_probabilities
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


def test_greedy_is_the_largest_logit_of_the_cropped_context(model):
    new = generate(model, [1, 2, 3], max_new_tokens=40, temperature=0)
    assert len(new) == 40
    ids = [1, 2, 3]
    for token in new:  # past 20 tokens, the model sees the last 20
        logits = model(torch.tensor([ids[-20:]]))[0, -1]
        assert token == logits.argmax()
        ids.append(token)
    assert new == generate(model, [1, 2, 3], max_new_tokens=40, temperature=0, seed=7)


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
    squared = torch.tensor([0.01, 0.16, 0.04, 0.09])
    assert probabilities(temperature=0.5) == pytest.approx((squared / squared.sum()).tolist())


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


def test_bad_prompts_are_named(model):
    with pytest.raises(ValueError, match="no tokens"):
        generate(model, [], max_new_tokens=1)
    with pytest.raises(ValueError, match="from 3 to 260, outside the model's vocabulary of 260"):
        generate(model, [3, 260], max_new_tokens=1)


def test_a_compiled_model_generates_uncompiled():
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(16, 32, 1, 2, 20, 50))
    expected = generate(model, [1], max_new_tokens=5)

    def refuse(*_):
        raise AssertionError("compiled")

    model.compile_blocks(backend=refuse)
    assert generate(model, [1], max_new_tokens=5) == expected
