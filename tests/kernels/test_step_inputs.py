"""A step's inputs and the block tables, computed on the device, against numpy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from triton_functions import DEVICE, prepare_triton

prepare_triton()

from mini_infer_kernels.step_inputs import (  # noqa: E402
    StepRows,
    TokenInputs,
    triton_step_inputs,
    triton_update_tables,
)

Ints = NDArray[np.int64]

NUM_SLOTS = 9
NUM_LAST_IDS = 12
VOCAB_SIZE = 100_000
SENTINEL = -77
"""What no computed value is; stands where nothing may be written, or read."""
SURPLUS = 5
"""Elements of the outputs behind a step's."""
NO_ROW = -1


class Row(NamedTuple):
    """A sequence's share of a step."""

    slot: int
    num_computed: int
    num_tokens: int
    num_turned: int = 0


class Step(NamedTuple):
    """A step's integers, and what is to come of them."""

    token_ids: Ints
    slots: Ints
    num_computed: Ints
    starts: Ints
    num_turned: Ints
    last_ids: Ints
    tables: Ints


STEPS: dict[str, list[Row]] = {
    "one token": [Row(0, 0, 1)],
    "a token each, slots out of order": [Row(8, 33, 1), Row(2, 15, 1), Row(5, 16, 1), Row(0, 0, 1)],
    "a prompt in one program": [Row(3, 0, 256)],
    "a prompt in two programs": [Row(3, 0, 257)],
    "prompts of several lengths": [Row(7, 700, 1), Row(1, 0, 513), Row(4, 44, 300), Row(0, 9, 3)],
    "padding behind": [Row(6, 20, 1), Row(1, 31, 1), Row(0, NO_ROW, 1), Row(0, NO_ROW, 1)],
    "padding of several tokens": [Row(2, 5, 7), Row(0, NO_ROW, 4), Row(1, 5, 1)],
    "padding in two programs": [Row(0, NO_ROW, 300), Row(8, 100, 290)],
    "padding alone": [Row(0, NO_ROW, 1)],
    "a row without tokens": [Row(4, 12, 0), Row(5, 12, 2)],
    "turned for a longer text": [Row(1, 40, 1, 64), Row(2, 60, 8, 64), Row(0, NO_ROW, 1)],
}


def step_of(rows: list[Row], block_size: int, *, seed: int = 0) -> Step:
    """A step with random tokens, some of which the step before has chosen, and random blocks."""
    generator = np.random.default_rng(seed)
    lengths = [row.num_tokens for row in rows]
    token_ids = generator.integers(0, VOCAB_SIZE, sum(lengths))
    is_unknown = generator.random(len(token_ids)) < 0.3
    is_unknown[:1] = True
    unknown = -1 - generator.integers(0, NUM_LAST_IDS, len(token_ids))
    longest = max(row.num_computed + row.num_tokens for row in rows)
    num_blocks = -(-longest // block_size) + 2
    tables = np.full((NUM_SLOTS, num_blocks), SENTINEL, np.int64)
    for row in rows:
        used = -(-(row.num_computed + row.num_tokens) // block_size) if row.num_computed >= 0 else 0
        # Slots of such blocks take more than 32 bits.
        tables[row.slot, :used] = generator.integers(0, 2**31, used)
    return Step(
        token_ids=np.where(is_unknown, unknown, token_ids),
        slots=np.array([row.slot for row in rows]),
        num_computed=np.array([row.num_computed for row in rows]),
        starts=np.cumsum([0, *lengths]),
        num_turned=np.array([row.num_turned for row in rows]),
        last_ids=generator.integers(0, VOCAB_SIZE, NUM_LAST_IDS),
        tables=tables,
    )


def expected_of(step: Step, block_size: int) -> dict[str, list[int]]:
    """Token by token, as the documentation of the kernel has it."""
    expected: dict[str, list[int]] = {
        "token_ids": [
            int(each if each >= 0 else step.last_ids[-1 - each]) for each in step.token_ids
        ],
        "positions": [],
        "rotation_lens": [],
        "slot_mapping": [],
        "context_lens": [],
    }
    for row, computed in enumerate(step.num_computed.tolist()):
        num_tokens = int(step.starts[row + 1] - step.starts[row])
        is_row = computed >= 0
        expected["context_lens"].append(computed + num_tokens if is_row else 0)
        for token in range(num_tokens):
            position = computed + token if is_row else 0
            block = int(step.tables[step.slots[row], position // block_size])
            slot = block * block_size + position % block_size
            expected["positions"].append(position)
            expected["slot_mapping"].append(slot if is_row else -1)
            expected["rotation_lens"].append(max(position + 1, int(step.num_turned[row])))
    return expected


def on_device(parts: list[Ints]) -> list[torch.Tensor]:
    """int32 copies on the device, behind each other and so at addresses of any alignment."""
    whole = torch.from_numpy(np.concatenate([[0], *parts])).to(torch.int32).to(DEVICE)
    return list(whole[1:].split([len(part) for part in parts]))


def table_on_device(tables: Ints) -> torch.Tensor:
    """int32 rows that stand apart."""
    num_rows, width = tables.shape
    wide = torch.full((num_rows, width + 3), SENTINEL, dtype=torch.int32, device=DEVICE)
    wide[:, :width] = torch.from_numpy(tables)
    return wide[:, :width]


def poisoned(num_tokens: int, num_rows: int, *, has_rotation_lens: bool) -> TokenInputs:
    def filled(length: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((length + SURPLUS,), SENTINEL, dtype=dtype, device=DEVICE)

    return TokenInputs(
        token_ids=filled(num_tokens, torch.int32),
        positions=filled(num_tokens, torch.int64),
        rotation_lens=filled(num_tokens, torch.int64) if has_rotation_lens else None,
        slot_mapping=filled(num_tokens, torch.int64),
        context_lens=filled(num_rows, torch.int32),
    )


@pytest.mark.parametrize("has_rotation_lens", [True, False], ids=["lens", "no lens"])
@pytest.mark.parametrize("block_size", [16, 5])
@pytest.mark.parametrize("name", STEPS)
def test_inputs_equal_those_counted_token_by_token(
    name: str, block_size: int, has_rotation_lens: bool
) -> None:
    rows = STEPS[name]
    step = step_of(rows, block_size)
    num_tokens = len(step.token_ids)
    outputs = poisoned(num_tokens, len(rows), has_rotation_lens=has_rotation_lens)
    *fields, last_ids = on_device([*step[:5], step.last_ids])
    triton_step_inputs(
        StepRows(*fields),
        last_ids,
        table_on_device(step.tables),
        block_size,
        max(row.num_tokens for row in rows),
        outputs,
    )
    for field, expected in expected_of(step, block_size).items():
        got = getattr(outputs, field)
        if got is None:
            assert (field, has_rotation_lens) == ("rotation_lens", False)
            continue
        assert got.tolist() == expected + [SENTINEL] * SURPLUS, field


def test_a_smaller_step_behind_a_larger_one_in_the_same_memory() -> None:
    large, small = (step_of(STEPS[name], 16) for name in ("padding in two programs", "one token"))
    outputs = poisoned(len(large.token_ids), len(large.slots), has_rotation_lens=True)
    for step in (large, small):
        *fields, last_ids = on_device([*step[:5], step.last_ids])
        longest = int(np.diff(step.starts).max())
        table = table_on_device(step.tables)
        triton_step_inputs(StepRows(*fields), last_ids, table, 16, longest, outputs)
    left_behind = expected_of(large, 16)
    for field, own in expected_of(small, 16).items():
        expected = own + left_behind[field][len(own) :] + [SENTINEL] * SURPLUS
        assert getattr(outputs, field).tolist() == expected, field


@pytest.mark.parametrize("num_updates", [1, 2, 255, 256, 257, 700])
def test_only_the_named_entries_of_the_tables_change(num_updates: int) -> None:
    generator = np.random.default_rng(num_updates)
    width = 101
    tables = generator.integers(0, 2**31, (NUM_SLOTS, width))
    places = generator.permutation(NUM_SLOTS * width)[:num_updates]
    updates = np.stack((places // width, places % width, generator.integers(0, 2**31, num_updates)))
    table = table_on_device(tables)
    whole = table._base
    assert whole is not None
    (flat,) = on_device([updates.ravel()])
    triton_update_tables(table, flat.view(3, -1))
    expected = np.full((NUM_SLOTS, whole.shape[1]), SENTINEL, np.int64)
    expected[:, :width] = tables
    expected[updates[0], updates[1]] = updates[2]
    assert np.array_equal(whole.cpu().numpy(), expected)
