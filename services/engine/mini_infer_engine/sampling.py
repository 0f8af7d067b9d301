"""Chooses the next token of each row from its logits.

Greedy rows take the likeliest token. Others divide the logits by the temperature, keep the top-k
likeliest, then the smallest set of likeliest whose share of the kept probability reaches top-p,
and draw from what is left by inverting its cumulative distribution.

The random number of a draw is a function of the request's seed and the output position alone
(counter-based: Philox4x64-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011, as numpy implements it), so a request draws the same in any batch, after preemption, and
when it is resumed.
"""

from __future__ import annotations

import numpy as np
import torch

from mini_infer_engine.batch import Bools, Ints, SamplingColumns

_MIN_TEMPERATURE = 1e-5
"""Below it logits would overflow; the distribution is all on the likeliest token anyway."""


def uniform(seed: int, position: int) -> float:
    """The random number of one draw, in [0, 1) with 53 bits.

    Args:
        seed: 64 bits.
        position: Output position of the token that is drawn.
    """
    bits = np.random.Philox(key=seed, counter=position)
    return float(bits.random_raw() >> 11) * 2.0**-53


def sample(logits: torch.Tensor, columns: SamplingColumns) -> tuple[Ints, Bools]:
    """Chooses a token per row.

    Args:
        logits: [R, vocab_size] float32; changed in place.
        columns: How, for the R rows.

    Returns:
        [R, 1] token ids, and [R] whether they mean anything: not where a row has NaN or infinity,
        or nothing that may be chosen.
    """
    if len(columns.banned_rows):
        rows = torch.from_numpy(columns.banned_rows).to(logits.device)
        ids = torch.from_numpy(columns.banned_ids).to(logits.device)
        logits[rows, ids] = -torch.inf
    chosen, finite = _likeliest(logits)
    if columns.temperatures.any():
        drawn = np.flatnonzero(columns.temperatures)
        rows = torch.from_numpy(drawn).to(logits.device)
        chosen[drawn] = _draw(logits[rows], columns, drawn).numpy(force=True)
    return chosen[:, None], finite


def _likeliest(logits: torch.Tensor) -> tuple[Ints, Bools]:
    """The likeliest token of each row, and whether its logit is finite; NaN is above all."""
    if logits.device.type != "cpu":
        greatest, chosen = logits.max(-1)
        return chosen.numpy(force=True), greatest.isfinite().numpy(force=True)
    scores = logits.numpy()  # which searches several times as fast
    ids = scores.argmax(-1)
    return ids, np.isfinite(scores[np.arange(len(ids)), ids])


def _draw(
    logits: torch.Tensor, columns: SamplingColumns, drawn: np.typing.NDArray[np.intp]
) -> torch.Tensor:
    """Draws from the restricted distributions of the rows whose temperature is not 0."""
    device = logits.device
    vocab_size = logits.shape[-1]
    temperatures = np.maximum(columns.temperatures[drawn], _MIN_TEMPERATURE)
    # The greatest logit is moved to 0 first: a low temperature cannot overflow it then.
    logits = logits - logits.amax(-1, keepdim=True)
    ordered, ids = (logits / _column(temperatures, device)).sort(
        dim=-1, descending=True, stable=True
    )
    top_ks = np.where(columns.top_ks[drawn] == 0, vocab_size, columns.top_ks[drawn])
    ranks = torch.arange(vocab_size, device=device)
    ordered.masked_fill_(ranks >= _column(top_ks, device), -torch.inf)
    probabilities = ordered.double().softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # share of the likelier ones
    probabilities.masked_fill_(before >= _column(columns.top_ps[drawn], device), 0.0)
    cumulative = probabilities.cumsum(-1)
    uniforms = np.array(
        [uniform(int(columns.seeds[row]), int(columns.positions[row])) for row in drawn]
    )
    targets = _column(uniforms, device) * cumulative[:, -1:]
    picks = torch.searchsorted(cumulative, targets, right=True).clamp_(max=vocab_size - 1)
    picked: torch.Tensor = ids.gather(-1, picks)
    return picked.squeeze(-1)


def _column(values: np.typing.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device).unsqueeze(-1)
