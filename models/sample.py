"""`sample`: continues a sequence of tokens with a GPT-2."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ortho_fx.arguments import is_integer, is_number
from ortho_fx.errors import OrthoFxError
from ortho_fx.models.gpt2 import GPT2
from ortho_fx.modes import evaluating


def sample(
    model: GPT2,
    prompt: Tensor,
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    vocabulary: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws the tokens that follow a prompt, one after the other, from the model's distribution.

    With logits z of the next token, a token i is drawn with probability exp(z_i / temperature) / sum_j exp(z_j /
    temperature). The sum is over the `top_k` largest logits. The model sees the last `context` tokens at most, so a
    longer sequence slides through its window. It runs in eval mode, without gradients, and is not changed.

    Args:
        model: a GPT-2, rewritten or not, on any device.
        prompt: the tokens to continue, (length,) of integers, one or more.
        tokens: how many to draw.
        temperature: above 1 for more chance, below 1 for less; 0 takes the token of the largest logit.
        top_k: draw among so many of the most likely tokens (None: among all).
        vocabulary: draw among the tokens below this number (None: all that the model knows). Some vocabularies are
            filled up to a round number with tokens that mean nothing.
        generator: of the CPU, so that the same seed draws the same on every device; PyTorch's own when omitted.

    Returns:
        The drawn tokens without the prompt, (tokens,) int64, on the CPU.

    Raises:
        OrthoFxError: an argument out of range, a prompt with tokens that the model does not know, or logits that are
            not finite.
    """
    known = model.config.vocabulary if vocabulary is None else vocabulary
    if not is_integer(known) or not 1 <= known <= model.config.vocabulary:
        raise OrthoFxError(f"vocabulary must be from 1 to {model.config.vocabulary}, the model's; got {known!r}")
    if not is_integer(tokens) or tokens < 0:
        raise OrthoFxError(f"tokens must be a whole number, zero or more; got {tokens!r}")
    if not is_number(temperature) or not 0 <= temperature < math.inf:
        raise OrthoFxError(f"temperature must be a finite number, zero or more; got {temperature!r}")
    if top_k is not None and (not is_integer(top_k) or not 1 <= top_k <= known):
        raise OrthoFxError(f"top_k must be from 1 to {known}, the number of tokens to draw from; got {top_k!r}")
    if prompt.dim() != 1 or not len(prompt) or prompt.is_floating_point():
        raise OrthoFxError(
            f"prompt must be one or more tokens, (length,) of integers; got {tuple(prompt.shape)} {prompt.dtype}"
        )
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= model.config.vocabulary:
        wrong = low if low < 0 else high
        raise OrthoFxError(
            f"the prompt has token {wrong}, and the model knows those from 0 to {model.config.vocabulary - 1}"
        )
    context, device = model.config.context, model.tokens.weight.device
    sequence = torch.cat([prompt.to("cpu", torch.int64), torch.zeros(tokens, dtype=torch.int64)])
    with torch.no_grad(), evaluating(model):
        for end in range(len(prompt), len(sequence)):
            window = sequence[max(end - context, 0) : end].to(device)
            logits = model(window[None])[0, -1, :known].to("cpu", torch.float64)
            if not logits.isfinite().all():
                raise OrthoFxError(f"the model's logits after {end} tokens are not finite: its weights are of no use")
            sequence[end] = _drawn(logits, temperature, top_k, generator)
    return sequence[len(prompt) :]


def _drawn(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax()
    values, places = logits.topk(len(logits) if top_k is None else top_k)
    # The largest logit is zero then, so that a division by a small temperature has no infinity minus infinity.
    weights = ((values - values[0]) / temperature).exp()
    return places[torch.multinomial(weights, 1, generator=generator)[0]]
