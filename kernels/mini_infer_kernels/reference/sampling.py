"""Chooses the next token of each row, in plain torch and float64.

A row's logits x go through these steps, in this order:

1. Tokens that the mask does not allow become -inf.
2. y = (x - max x) / temperature.
3. Min-p keeps p >= min_p * max p, where p is the softmax of y.
4. Top-k keeps x >= the k-th greatest of what is kept.
5. Top-p keeps the smallest set {x >= threshold} that has at least top_p of the kept mass.
6. Typical-p keeps the smallest set {|-log p - H| <= threshold} that has at least typical_p of the
   kept mass, where H is the entropy of what is kept.
7. The draw: the greatest y + Gumbel noise of the kept tokens, of equal ones the lowest id.

Each set is defined by a threshold, so tokens with equal logits are kept or dropped together.

Source: Meister et al., "Locally Typical Sampling", TACL 2023; Holtzman et al., "The Curious Case
of Neural Text Degeneration", ICLR 2020 (top-p); Nguyen et al., "Min-p Sampling", ICLR 2025.
"""

from __future__ import annotations

import torch

from mini_infer_kernels.draw_controls import (
    MIN_TEMPERATURE,
    NON_FINITE,
    NOTHING_ALLOWED,
    OK,
    DrawControls,
)
from mini_infer_kernels.reference.philox import gumbel_noise


def reference_choose_tokens(
    logits: torch.Tensor, controls: DrawControls
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses one token a row.

    Args:
        logits: [R, vocab_size] float32, only read; rows may stand at any distance, 0 included.
        controls: How, for the R rows.

    Returns:
        ids: [R] int64, 0 where the status is not OK.
        status: [R] int32, OK, NON_FINITE or NOTHING_ALLOWED.
    """
    broken = (logits.isnan() | logits.isposinf()).any(-1)
    allowed = _masked(logits, controls)
    greatest, ids = allowed.max(-1)
    status = torch.full_like(controls.mask_indices, OK)
    status[greatest.isneginf()] = NOTHING_ALLOWED
    status[broken] = NON_FINITE
    drawn = ((controls.temperatures > 0) & (status == OK)).nonzero().squeeze(-1)
    if len(drawn):
        scores = restricted_scores(allowed[drawn], controls, drawn)
        seeds, positions = controls.seeds[drawn], controls.positions[drawn]
        ids[drawn] = (scores + gumbel_noise(seeds, positions, scores.shape[-1])).argmax(-1)
    return ids.masked_fill_(status != OK, 0), status


def restricted_scores(
    logits: torch.Tensor, controls: DrawControls, rows: torch.Tensor
) -> torch.Tensor:
    """Scales the logits, and drops what a row may not draw: steps 2 to 6.

    Args:
        logits: [N, vocab_size] float32, masked, each row with a finite greatest one.
        controls: How, for R rows.
        rows: [N] int64, which of them these are.

    Returns:
        [N, vocab_size] float64: the y above, -inf where a token was dropped.
    """
    exact = logits.double()
    divisors = controls.temperatures[rows].double().clamp(min=MIN_TEMPERATURE)[:, None]
    scores = (exact - exact.amax(-1, keepdim=True)) / divisors
    for step in (_keep_min_p, _keep_top_k, _keep_top_p, _keep_typical_p):
        step(scores, controls, rows)
    return scores


def _masked(logits: torch.Tensor, controls: DrawControls) -> torch.Tensor:
    """A copy with -inf where the row's mask does not allow the token."""
    masked_rows = (controls.mask_indices >= 0).nonzero().squeeze(-1)
    allowed = logits.clone()
    if len(masked_rows):
        words = controls.masks[controls.mask_indices[masked_rows].long()]
        bits = torch.arange(32, dtype=torch.int32, device=words.device)
        flags = ((words[:, :, None] >> bits) & 1).flatten(1)[:, : logits.shape[-1]]
        allowed[masked_rows] = allowed[masked_rows].masked_fill(flags == 0, -torch.inf)
    return allowed


def _keep_min_p(scores: torch.Tensor, controls: DrawControls, rows: torch.Tensor) -> None:
    """Drops, as -inf, the tokens below a share of the likeliest one's probability."""
    bounds = controls.min_ps[rows].double().log()[:, None]
    scores.masked_fill_(scores < bounds, -torch.inf)


def _keep_top_k(scores: torch.Tensor, controls: DrawControls, rows: torch.Tensor) -> None:
    """Drops the tokens below the k-th likeliest."""
    top_ks = controls.top_ks[rows].long()
    limited = ((top_ks > 0) & (top_ks < scores.shape[-1])).nonzero().squeeze(-1)
    if len(limited):
        chosen = scores[limited]
        ordered = chosen.sort(dim=-1, descending=True).values
        bounds = ordered.gather(-1, top_ks[limited, None] - 1)
        scores[limited] = chosen.masked_fill(chosen < bounds, -torch.inf)


def _keep_top_p(scores: torch.Tensor, controls: DrawControls, rows: torch.Tensor) -> None:
    """Drops the tokens below the least threshold whose tokens have the share top_p."""
    shares = controls.top_ps[rows].double()
    limited = (shares < 1).nonzero().squeeze(-1)
    if len(limited):
        chosen = scores[limited]
        dropped = chosen < _threshold(chosen, chosen.exp(), shares[limited])
        scores[limited] = chosen.masked_fill(dropped, -torch.inf)


def _keep_typical_p(scores: torch.Tensor, controls: DrawControls, rows: torch.Tensor) -> None:
    """Drops the tokens whose surprise is farther from the mean than a share needs."""
    shares = controls.typical_ps[rows].double()
    limited = (shares < 1).nonzero().squeeze(-1)
    if len(limited):
        chosen = scores[limited]
        masses = chosen.exp()
        # A dropped token is -inf, and its share of the mean 0.
        moments = torch.where(masses > 0, chosen, 0.0) * masses
        means = moments.sum(-1, keepdim=True) / masses.sum(-1, keepdim=True)
        nearness = -(chosen - means).abs()
        dropped = nearness < _threshold(nearness, masses, shares[limited])
        scores[limited] = chosen.masked_fill(dropped, -torch.inf)


def _threshold(ranking: torch.Tensor, masses: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The greatest threshold of a ranking at or above which a share of the mass lies: [R, 1]."""
    ordered, order = ranking.sort(dim=-1, descending=True)
    reached = masses.gather(-1, order).cumsum(-1)
    targets = shares[:, None] * reached[:, -1:]
    return ordered.gather(-1, torch.searchsorted(reached, targets))
