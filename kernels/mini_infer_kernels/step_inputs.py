"""What the layers need of each token of a step, computed on the device from a few numbers a row.

A row is a sequence with its new tokens, behind each other in the step. For token j of row i:
`position = num_computed[i] + j`, `slot = table[position // block_size] * block_size +
position % block_size`. The block tables stay on the device, a row a slot of the running batch;
`triton_update_tables` takes in what changed of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_TOKENS = 256
"""Of a row that a program computes: prompts take several programs, and decoding rows need one."""
_UPDATES = 256


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of a step, S of them with T tokens; all on the device.

    Attributes:
        token_ids: [T] int32; -1 - i is entry i of `last_ids`, what the step before has chosen.
        slots: [S] int32, the row of the block tables.
        num_computed: [S] int32, tokens in the cache before the step; -1 is no row at all, which
            pads a step to the size of a CUDA graph.
        starts: [S + 1] int32, where each row's tokens begin in the step, and where they end.
        num_turned: [S] int32, least length of text that a row's tokens are turned for.
    """

    token_ids: torch.Tensor
    slots: torch.Tensor
    num_computed: torch.Tensor
    starts: torch.Tensor
    num_turned: torch.Tensor


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """What is computed; on the device.

    Attributes:
        token_ids: [T] int32, all of them known.
        positions: [T] int64.
        rotation_lens: [T] int64, the greater of position + 1 and the row's `num_turned`; None where
            no model asks.
        slot_mapping: [T] int64; -1 for tokens of no row.
        context_lens: [S] int32, the tokens in the cache after the step; 0 for no row.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    rotation_lens: torch.Tensor | None
    slot_mapping: torch.Tensor
    context_lens: torch.Tensor


def triton_step_inputs(
    rows: StepRows,
    last_ids: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    max_row_tokens: int,
    outputs: TokenInputs,
) -> None:
    """Computes the inputs of a step.

    Args:
        rows: Of the step.
        last_ids: [max rows] int32, what the step before has chosen.
        block_tables: [max rows, max blocks] int32.
        block_size: Tokens in a block.
        max_row_tokens: Tokens of the longest row.
        outputs: Filled in.
    """
    rotation_lens = outputs.rotation_lens
    _step_inputs_kernel[(len(rows.slots), triton.cdiv(max_row_tokens, _TOKENS))](
        rows.token_ids,
        last_ids,
        rows.slots,
        rows.num_computed,
        rows.starts,
        rows.num_turned,
        block_tables,
        block_tables.stride(0),
        outputs.token_ids,
        outputs.positions,
        outputs.positions if rotation_lens is None else rotation_lens,
        outputs.slot_mapping,
        outputs.context_lens,
        BLOCK_SIZE=block_size,
        HAS_ROTATION_LENS=rotation_lens is not None,
        TOKENS=_TOKENS,
        num_warps=2,
    )


def triton_update_tables(block_tables: torch.Tensor, updates: torch.Tensor) -> None:
    """Writes entries of block tables.

    Args:
        block_tables: [max rows, max blocks] int32, changed in place.
        updates: [3, U] int32 and contiguous: row, column and new entry; no place twice.
    """
    num_updates = updates.shape[1]
    _update_tables_kernel[(triton.cdiv(num_updates, _UPDATES),)](
        block_tables, block_tables.stride(0), updates, num_updates, UPDATES=_UPDATES, num_warps=4
    )


_ROW_POINTERS = ["token_ids", "slots", "num_computed", "starts", "num_turned"]


@triton.jit(do_not_specialize_on_alignment=_ROW_POINTERS)
def _step_inputs_kernel(
    token_ids: tl.tensor,
    last_ids: tl.tensor,
    slots: tl.tensor,
    num_computed: tl.tensor,
    starts: tl.tensor,
    num_turned: tl.tensor,
    block_tables: tl.tensor,
    table_stride: tl.tensor,
    known_ids: tl.tensor,
    positions: tl.tensor,
    rotation_lens: tl.tensor,
    slot_mapping: tl.tensor,
    context_lens: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HAS_ROTATION_LENS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """A program for TOKENS tokens of a row."""
    row = tl.program_id(0)
    start = tl.load(starts + row)
    num_tokens = tl.load(starts + row + 1) - start
    computed = tl.load(num_computed + row)
    is_row = computed >= 0
    first = tl.program_id(1) * TOKENS
    if first == 0:
        tl.store(context_lens + row, tl.where(is_row, computed + num_tokens, 0))
    token = first + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    token_id = tl.load(token_ids + start + token, mask=is_token, other=0)
    is_unknown = is_token & (token_id < 0)
    chosen = tl.load(last_ids - 1 - token_id, mask=is_unknown, other=0)
    tl.store(known_ids + start + token, tl.where(is_unknown, chosen, token_id), mask=is_token)
    position = tl.where(is_row, computed + token, 0)
    table = block_tables + tl.load(slots + row).to(tl.int64) * table_stride
    block = tl.load(table + position // BLOCK_SIZE, mask=is_token & is_row, other=0).to(tl.int64)
    slot = tl.where(is_row, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    tl.store(positions + start + token, position.to(tl.int64), mask=is_token)
    tl.store(slot_mapping + start + token, slot, mask=is_token)
    if HAS_ROTATION_LENS:
        turned = tl.maximum(position + 1, tl.load(num_turned + row))
        tl.store(rotation_lens + start + token, turned.to(tl.int64), mask=is_token)


@triton.jit(do_not_specialize=["num_updates"], do_not_specialize_on_alignment=["updates"])
def _update_tables_kernel(
    block_tables: tl.tensor,
    table_stride: tl.tensor,
    updates: tl.tensor,
    num_updates: tl.tensor,
    UPDATES: tl.constexpr,
) -> None:
    """A program for UPDATES entries."""
    update = tl.program_id(0) * UPDATES + tl.arange(0, UPDATES)
    is_update = update < num_updates
    row = tl.load(updates + update, mask=is_update, other=0).to(tl.int64)
    column = tl.load(updates + num_updates + update, mask=is_update, other=0)
    entry = tl.load(updates + 2 * num_updates + update, mask=is_update, other=0)
    tl.store(block_tables + row * table_stride + column, entry, mask=is_update)
