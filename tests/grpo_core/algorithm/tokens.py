"""Random tokens for the tests of formulas."""

import torch

LENGTHS = [7, 0, 1, 23, 12, 4]  # a completion without tokens among them
INDEX = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))


def random_tokens(count: int = 200, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(count, generator=generator, dtype=torch.float64)
    logprob = old + 0.6 * torch.randn(count, generator=generator, dtype=torch.float64)
    advantages = torch.randn(count, generator=generator, dtype=torch.float64)
    return logprob.requires_grad_(), old, advantages


def random_completions(seed: int = 0):
    """Tokens of `LENGTHS`, with one advantage for each completion."""
    logprob, old, advantages = random_tokens(len(INDEX), seed)
    return logprob, old, advantages[: len(LENGTHS)][INDEX]
