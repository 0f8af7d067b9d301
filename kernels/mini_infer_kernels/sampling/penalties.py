"""Penalties, biases and the counts behind them in Triton (contracts: `reference/penalties.py`).

Only the tokens that a slot has seen are touched, never whole rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mini_infer_kernels.token_counts import TokenCounts

_BLOCK = 256
_PROGRAMS_PER_ROW = 8
"""Sequences of up to 2048 distinct tokens are penalised in one go."""


def triton_add_to_logits(
    logits: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, values: torch.Tensor
) -> None:
    """As `reference_add_to_logits`; the elements of a row stand side by side."""
    num_pairs = len(rows)
    if num_pairs:
        _add_to_logits_kernel[(triton.cdiv(num_pairs, _BLOCK),)](
            logits, logits.stride(0), rows, ids, values, num_pairs, BLOCK=_BLOCK
        )


def triton_reset_counts(counts: TokenCounts, slots: torch.Tensor) -> None:
    """As `reference_reset_counts`."""
    if len(slots):
        _reset_counts_kernel[(len(slots),)](
            counts.counts,
            counts.counts.shape[1],
            counts.distinct_ids,
            counts.distinct_ids.shape[1],
            counts.num_distinct,
            slots,
            BLOCK=_BLOCK,
        )


def triton_count_tokens(
    counts: TokenCounts, slots: torch.Tensor, ids: torch.Tensor, is_output: torch.Tensor
) -> None:
    """As `reference_count_tokens`."""
    num_tokens = len(slots)
    if num_tokens:
        _count_tokens_kernel[(triton.cdiv(num_tokens, _BLOCK),)](
            counts.counts,
            counts.counts.shape[1],
            counts.distinct_ids,
            counts.distinct_ids.shape[1],
            counts.num_distinct,
            slots,
            ids,
            is_output,
            num_tokens,
            BLOCK=_BLOCK,
        )


def triton_apply_penalties(
    logits: torch.Tensor,
    counts: TokenCounts,
    slots: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """As `reference_apply_penalties`; the elements of a row stand side by side."""
    if len(slots):
        _apply_penalties_kernel[(_PROGRAMS_PER_ROW, len(slots))](
            logits,
            logits.stride(0),
            counts.counts,
            counts.counts.shape[1],
            counts.distinct_ids,
            counts.distinct_ids.shape[1],
            counts.num_distinct,
            slots,
            repetition,
            presence,
            frequency,
            BLOCK=_BLOCK,
        )


@triton.jit(
    do_not_specialize=["num_pairs"],
    do_not_specialize_on_alignment=["rows_ptr", "ids_ptr", "values_ptr"],
)
def _add_to_logits_kernel(
    logits_ptr: tl.tensor,
    row_stride: tl.tensor,
    rows_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    values_ptr: tl.tensor,
    num_pairs: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    pairs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pairs < num_pairs
    rows = tl.load(rows_ptr + pairs, mask=inside, other=0)
    ids = tl.load(ids_ptr + pairs, mask=inside, other=0)
    values = tl.load(values_ptr + pairs, mask=inside, other=0.0)
    tl.atomic_add(logits_ptr + rows * row_stride + ids, values, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def _reset_counts_kernel(
    counts_ptr: tl.tensor,
    vocab_size: tl.tensor,
    distinct_ids_ptr: tl.tensor,
    max_distinct: tl.tensor,
    num_distinct_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    slot = tl.load(slots_ptr + tl.program_id(0))
    num_distinct = tl.minimum(tl.load(num_distinct_ptr + slot), max_distinct)
    start = 0
    while start < num_distinct:
        places = start + tl.arange(0, BLOCK)
        inside = places < num_distinct
        ids = tl.load(distinct_ids_ptr + slot * max_distinct + places, mask=inside, other=0)
        tl.store(counts_ptr + slot * vocab_size + ids, 0, mask=inside)
        start += BLOCK
    tl.store(num_distinct_ptr + slot, 0)


@triton.jit(
    do_not_specialize=["num_tokens"],
    do_not_specialize_on_alignment=["slots_ptr", "ids_ptr", "is_output_ptr"],
)
def _count_tokens_kernel(
    counts_ptr: tl.tensor,
    vocab_size: tl.tensor,
    distinct_ids_ptr: tl.tensor,
    max_distinct: tl.tensor,
    num_distinct_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    is_output_ptr: tl.tensor,
    num_tokens: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < num_tokens
    slots = tl.load(slots_ptr + tokens, mask=inside, other=0)
    ids = tl.load(ids_ptr + tokens, mask=inside, other=0)
    is_output = tl.load(is_output_ptr + tokens, mask=inside, other=0) != 0
    count_ptrs = counts_ptr + slots * vocab_size + ids
    before = tl.atomic_add(count_ptrs, 2, mask=inside & is_output, sem="relaxed")
    before_prompt = tl.atomic_or(count_ptrs, 1, mask=inside & ~is_output, sem="relaxed")
    # Of all that count a token for the first time, one alone sees the 0.
    is_new = inside & (tl.where(is_output, before, before_prompt) == 0)
    places = tl.atomic_add(num_distinct_ptr + slots, 1, mask=is_new, sem="relaxed")
    fits = is_new & (places < max_distinct)
    tl.store(distinct_ids_ptr + slots * max_distinct + places, ids.to(tl.int32), mask=fits)


@triton.jit(
    do_not_specialize_on_alignment=["slots_ptr", "repetition_ptr", "presence_ptr", "frequency_ptr"]
)
def _apply_penalties_kernel(
    logits_ptr: tl.tensor,
    row_stride: tl.tensor,
    counts_ptr: tl.tensor,
    vocab_size: tl.tensor,
    distinct_ids_ptr: tl.tensor,
    max_distinct: tl.tensor,
    num_distinct_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    repetition_ptr: tl.tensor,
    presence_ptr: tl.tensor,
    frequency_ptr: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64)
    repetition = tl.load(repetition_ptr + row)
    presence = tl.load(presence_ptr + row)
    frequency = tl.load(frequency_ptr + row)
    if (repetition != 1) | (presence != 0) | (frequency != 0):
        slot = tl.load(slots_ptr + row)
        num_distinct = tl.minimum(tl.load(num_distinct_ptr + slot), max_distinct)
        first = tl.program_id(0) * BLOCK
        start = first
        while start < num_distinct:
            places = start + tl.arange(0, BLOCK)
            inside = places < num_distinct
            ids = tl.load(distinct_ids_ptr + slot * max_distinct + places, mask=inside, other=0)
            counts = tl.load(counts_ptr + slot * vocab_size + ids, mask=inside, other=0)
            num_outputs = counts >> 1
            logit_ptrs = logits_ptr + row * row_stride + ids
            logits = tl.load(logit_ptrs, mask=inside, other=0.0)
            logits = tl.where(logits > 0, tl.div_rn(logits, repetition), logits * repetition)
            lost = frequency * num_outputs + tl.where(num_outputs > 0, presence, 0.0)
            tl.store(logit_ptrs, logits - lost, mask=inside)
            start += tl.num_programs(0) * BLOCK
