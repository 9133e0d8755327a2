"""Choosing the next token of each draft: greedy, or a seeded sample that does not depend on the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Chosen:
    """The next tokens of N drafts.

    Attributes:
        tokens_N: Token ids, ``[N]``.
        finite_N: Whether the logits of each draft are finite, ``[N]``. If they are not, its token is meaningless.
        logprobs_N: Log-probabilities of the tokens in nats, ``[N]``; ``None`` if not requested.
    """

    tokens_N: Tensor
    finite_N: Tensor
    logprobs_N: Tensor | None


class Sampler:
    """Samples the next tokens of a fixed set of drafts.

    Args:
        temperatures: Temperature of each draft; 0 is greedy.
        top_ps: Nucleus sampling threshold of each draft.
        generators: The source of randomness of each draft; ``None`` for greedy ones.
        device: Device of the logits.
        logprobs: Whether to compute log-probabilities.
    """

    def __init__(
        self,
        temperatures: Sequence[float],
        top_ps: Sequence[float],
        generators: Sequence[torch.Generator | None],
        device: torch.device,
        *,
        logprobs: bool,
    ) -> None:
        sampled = [place for place, temperature in enumerate(temperatures) if temperature > 0]
        self._generators = [generator for generator in generators if generator is not None]
        self._sampled_S = torch.tensor(sampled, dtype=torch.long, device=device)
        self._temperature_N = torch.tensor(temperatures, device=device)
        self._temperature_S = self._temperature_N[self._sampled_S]
        self._top_p_S = torch.tensor([top_ps[place] for place in sampled], device=device)
        self._logprobs = logprobs

    def __call__(self, logits_N_V: Tensor) -> Chosen:
        """Chooses a token for each draft from its logits, ``[N, V]``."""
        peak_N, tokens_N = logits_N_V.max(dim=-1)
        finite_N = peak_N.isfinite()
        if self._generators:
            logits_S_V = logits_N_V[self._sampled_S]
            noise_S_V = torch.empty_like(logits_S_V, dtype=torch.float32)
            for noise_V, generator in zip(noise_S_V, self._generators, strict=True):
                noise_V.exponential_(generator=generator)
            tokens_N[self._sampled_S] = choose(logits_S_V, self._temperature_S, self._top_p_S, noise_S_V)
        return Chosen(tokens_N, finite_N, self._log_probabilities(logits_N_V, tokens_N) if self._logprobs else None)

    def _log_probabilities(self, logits_N_V: Tensor, tokens_N: Tensor) -> Tensor:
        scaled_N_V = logits_N_V.float() / self._temperature_N.where(self._temperature_N > 0, 1.0)[:, None]
        return scaled_N_V.gather(1, tokens_N[:, None])[:, 0] - scaled_N_V.logsumexp(dim=-1)


def choose(logits_R_V: Tensor, temperature_R: Tensor, top_p_R: Tensor, noise_R_V: Tensor) -> Tensor:
    """Chooses a token for each row: the most likely one where the temperature is 0, else a sample.

    A sample is the token with the largest p / noise. This is an exponential race, which token i wins with probability
    p_i. Rows whose logits differ only by rounding choose the same token unless two ratios are equal up to rounding.
    Inverting the cumulative sum of p would instead carry each difference on to every later token. The nucleus is the
    smallest set of most likely tokens whose probability reaches ``top_p`` (Holtzman et al., 2020).

    Args:
        logits_R_V: Logits, ``[R, V]``.
        temperature_R: Temperatures, ``[R]``.
        top_p_R: Nucleus sampling thresholds, ``[R]``.
        noise_R_V: Draws from the exponential distribution of rate 1, ``[R, V]``.

    Returns:
        Token ids, ``[R]``.
    """
    positive_R = temperature_R.where(temperature_R > 0, 1.0)
    probs_R_V = (logits_R_V.float() / positive_R[:, None]).softmax(dim=-1)
    if bool((top_p_R < 1).any()):
        sorted_R_V, order_R_V = probs_R_V.sort(dim=-1, descending=True)
        outside_R_V = sorted_R_V.cumsum(dim=-1) - sorted_R_V >= top_p_R[:, None]
        # With a threshold of 1 all tokens are kept, although the cumulative sum may reach 1 early by rounding.
        outside_R_V &= (top_p_R < 1)[:, None]
        outside_R_V[:, 0] = False
        probs_R_V = probs_R_V.masked_fill(outside_R_V.scatter(-1, order_R_V, outside_R_V), 0.0)
    sampled_R = (probs_R_V / noise_R_V).argmax(dim=-1)
    return sampled_R.where(temperature_R > 0, logits_R_V.argmax(dim=-1))
