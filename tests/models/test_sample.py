"""What is drawn from a model: the distribution, its seed, its window."""

import pytest
import torch

from ortho_fx import ExpansionConfig, OrthoFxError, rewrite_
from ortho_fx.models.gpt2 import GPT2, GPT2Config
from ortho_fx.models.sample import sample

VOCABULARY, CONTEXT = 13, 6
PROMPT = torch.tensor([1, 2, 3])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = GPT2(GPT2Config(VOCABULARY, CONTEXT, 1, 2, 8, dropout=0.5))
    rewrite_(made, ExpansionConfig("fourier", 2))
    with torch.no_grad():
        made.tokens.weight.mul_(60)  # logits that differ by much
    return made


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def logits(model, sequence):
    """Those of the next token, as a caller sees them who knows the context alone."""
    model.eval()
    with torch.no_grad():
        found = model(torch.tensor(sequence[-CONTEXT:])[None])[0, -1]
    model.train()
    return found


def test_without_chance_each_token_is_the_likeliest_and_the_window_slides(model):
    drawn = sample(model, PROMPT, 12, temperature=0).tolist()
    sequence = PROMPT.tolist()
    for token in drawn:
        assert token == logits(model, sequence).argmax().item()
        sequence.append(token)
    assert len(sequence) == 15 > CONTEXT
    assert model.training
    assert sample(model, PROMPT, 12, top_k=1, generator=seeded(5)).tolist() == drawn


def test_a_seed_draws_the_same_again_and_leaves_the_generator_of_pytorch(model):
    state = torch.get_rng_state()
    first, again, other = (sample(model, PROMPT, 20, temperature=5.0, generator=seeded(s)) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    # Fewer tokens are the beginning of more.
    assert torch.equal(sample(model, PROMPT, 7, temperature=5.0, generator=seeded(3)), first[:7])


def test_frequencies_are_those_of_the_softmax_of_the_largest_logits(model):
    generator, temperature = seeded(0), 4.0
    drawn = [sample(model, PROMPT, 1, temperature=temperature, top_k=3, generator=generator).item() for _ in range(600)]
    values, places = logits(model, PROMPT.tolist()).topk(3)
    expected = (values / temperature).softmax(0)
    assert expected.min() > 0.02
    for place, share in zip(places.tolist(), expected.tolist(), strict=True):
        assert drawn.count(place) / 600 == pytest.approx(share, abs=0.08)
    assert set(drawn) == set(places.tolist())


def test_tokens_without_a_meaning_are_not_drawn(model):
    drawn = sample(model, PROMPT, 200, temperature=100.0, vocabulary=5, generator=seeded(0))
    assert set(drawn.tolist()) == set(range(5))


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([1, 13], {}, "the prompt has token 13, and the model knows those from 0 to 12"),
        ([-1, 2], {}, "the prompt has token -1, and the model knows those from 0 to 12"),
        ([], {}, "prompt must be one or more tokens, (length,) of integers; got (0,) torch.float32"),
        ([0.5], {}, "prompt must be one or more tokens, (length,) of integers; got (1,) torch.float32"),
        ([1], {"tokens": -1}, "tokens must be a whole number, zero or more; got -1"),
        ([1], {"temperature": -0.1}, "temperature must be a finite number, zero or more; got -0.1"),
        ([1], {"temperature": float("inf")}, "temperature must be a finite number, zero or more; got inf"),
        ([1], {"top_k": 0}, "top_k must be from 1 to 13, the number of tokens to draw from; got 0"),
        ([1], {"top_k": 4, "vocabulary": 3}, "top_k must be from 1 to 3, the number of tokens to draw from; got 4"),
        ([1], {"vocabulary": 14}, "vocabulary must be from 1 to 13, the model's; got 14"),
    ],
)
def test_wrong_arguments_are_named(model, prompt, settings, message):
    with pytest.raises(OrthoFxError) as caught:
        sample(model, torch.tensor(prompt), **{"tokens": 3, **settings})
    assert str(caught.value) == message


def test_weights_that_are_not_finite_are_told():
    broken = GPT2(GPT2Config(VOCABULARY, CONTEXT, 1, 2, 8))
    with torch.no_grad():
        broken.norm.bias.fill_(float("nan"))
    with pytest.raises(OrthoFxError, match="logits after 3 tokens are not finite"):
        sample(broken, PROMPT, 2)
