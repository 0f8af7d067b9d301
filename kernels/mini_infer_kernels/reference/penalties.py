"""What is added to logits, and the penalties of tokens that a sequence has seen.

Repetition: Keskar et al., "CTRL", 2019, over the prompt and the outputs. Presence and frequency:
as OpenAI's API defines them, over the outputs alone.
"""

from __future__ import annotations

import torch

from mini_infer_kernels.token_counts import TokenCounts


def reference_add_to_logits(
    logits: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, values: torch.Tensor
) -> None:
    """Adds to single logits, in place; NaN stays NaN.

    Args:
        logits: [R, vocab_size] float32.
        rows: [P] int64.
        ids: [P] int64. Pairs of row and id may repeat, and all their values are added; of one
            pair's values one at most is finite, so that the order does not change the sum.
        values: [P] float32, -inf to ban a token; not +inf.
    """
    logits.index_put_((rows, ids), values, accumulate=True)


def reference_reset_counts(counts: TokenCounts, slots: torch.Tensor) -> None:
    """Forgets what slots have seen, in place.

    Args:
        counts: Of all slots.
        slots: [N] int64.
    """
    counts.counts[slots] = 0
    counts.num_distinct[slots] = 0


def reference_count_tokens(
    counts: TokenCounts, slots: torch.Tensor, ids: torch.Tensor, is_output: torch.Tensor
) -> None:
    """Counts tokens, in place; a slot and id may come several times, as prompt and as output.

    Args:
        counts: Of all slots.
        slots: [N] int64, whose token it is.
        ids: [N] int64.
        is_output: [N] bool, False for tokens of the prompt.
    """
    vocab_size = counts.counts.shape[-1]
    flat = counts.counts.view(-1)
    places = slots * vocab_size + ids
    seen = torch.unique(places)  # sorted: a slot's come together
    new = seen[flat[seen] == 0]
    flat.index_put_((places[~is_output],), flat[places[~is_output]] | 1)
    outputs = places[is_output]
    flat.index_put_((outputs,), torch.full_like(outputs, 2, dtype=torch.int32), accumulate=True)
    new_slots = new // vocab_size
    ranks = torch.arange(len(new), device=new.device) - torch.searchsorted(new_slots, new_slots)
    positions = counts.num_distinct[new_slots] + ranks
    counts.distinct_ids[new_slots, positions] = (new % vocab_size).int()
    counts.num_distinct += torch.bincount(new_slots, minlength=len(counts.num_distinct)).int()


def reference_apply_penalties(
    logits: torch.Tensor,
    counts: TokenCounts,
    slots: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """Penalises what the rows' slots have seen, in place.

    First the repetition penalty r, for every id seen: x becomes x / r where x > 0, else x * r.
    Then x loses frequency * n + presence where n > 0 outputs were this id.

    Args:
        logits: [R, vocab_size] float32.
        counts: Of all slots.
        slots: [R] int64, the rows' slots.
        repetition: [R] float32, above 0; 1 is off.
        presence: [R] float32; 0 is off.
        frequency: [R] float32; 0 is off.
    """
    penalised = (repetition != 1) | (presence != 0) | (frequency != 0)
    for row in penalised.nonzero().flatten().tolist():
        slot = slots[row]
        ids = counts.distinct_ids[slot, : counts.num_distinct[slot]].long()
        num_outputs = counts.counts[slot, ids] // 2
        seen = logits[row, ids]
        seen = torch.where(seen > 0, seen / repetition[row], seen * repetition[row])
        lost = frequency[row] * num_outputs + presence[row] * (num_outputs > 0)
        logits[row, ids] = seen - lost
