"""Log-probabilities of chosen tokens and of the likeliest ones."""

from __future__ import annotations

import torch


def reference_token_logprobs(
    logits: torch.Tensor, ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The log-softmax of the logits as given, at the chosen and at the likeliest tokens.

    Args:
        logits: [R, vocab_size] float32, only read; a row with NaN or +inf has values that mean
            nothing.
        ids: [R] int64, the chosen tokens.
        num_top: How many of the likeliest; 0 to the size of the vocabulary.

    Returns:
        logprobs: [R] float32.
        ranks: [R] int32, 1 + the number of tokens that are likelier than the chosen one.
        top_ids: [R, num_top] int64, likeliest first, of equal ones the lowest id first.
        top_logprobs: [R, num_top] float32.
    """
    log_masses = logits.double().logsumexp(-1, keepdim=True)
    chosen = logits.gather(-1, ids[:, None])
    ranks = (logits > chosen).sum(-1, dtype=torch.int32) + 1
    top, top_ids = logits.sort(dim=-1, descending=True, stable=True)
    top, top_ids = top[:, :num_top], top_ids[:, :num_top]
    logprobs = (chosen - log_masses).float().squeeze(-1)
    return logprobs, ranks, top_ids, (top - log_masses).float()
