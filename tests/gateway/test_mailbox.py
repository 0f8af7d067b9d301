from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer_gateway.mailbox import Ending, EndReason, Mailbox, Parcel

ENDING = Ending(reason=EndReason.LENGTH, num_output_tokens=0)
STEPS = st.lists(st.integers(0, 5) | st.just("let the client take"), max_size=40)


@given(steps=STEPS, min_tokens=st.integers(1, 8))
def test_nothing_is_lost_or_reordered(steps: list[int | str], min_tokens: int) -> None:
    """Puts of some ids each, with takes in between wherever the client keeps up."""

    async def run() -> list[Parcel]:
        mailbox = Mailbox(min_tokens)
        parcels: list[Parcel] = []

        async def client() -> None:
            while not parcels or parcels[-1].end is None:
                parcels.append(await mailbox.take())

        task = asyncio.create_task(client())
        position = 0
        for step in steps:
            if isinstance(step, int):
                ids = list(range(position, position + step))
                mailbox.put("".join(f"{each}," for each in ids), ids)
                position += step
            else:
                await asyncio.sleep(0)
        mailbox.end(ENDING)
        await task
        return parcels

    parcels = asyncio.run(run())
    total = sum(step for step in steps if isinstance(step, int))
    assert [each for parcel in parcels for each in parcel.token_ids] == list(range(total))
    for parcel in parcels:
        assert parcel.text == "".join(f"{each}," for each in parcel.token_ids)
    for parcel in parcels[:-1]:
        assert len(parcel.token_ids) >= min_tokens
        assert parcel.end is None
    assert parcels[-1].end is ENDING


async def test_what_waits_is_taken_as_one() -> None:
    mailbox = Mailbox()
    mailbox.put("a", [1])
    mailbox.put("bc", [2, 3])
    mailbox.end(ENDING)
    assert await mailbox.take() == Parcel("abc", [1, 2, 3], ENDING)


async def test_first_end_counts_and_closes() -> None:
    mailbox = Mailbox()
    mailbox.end(ENDING)
    mailbox.end(MiniInferError(ErrorReason.ENGINE_LOST, "later"))
    mailbox.put("x", [1])
    assert await mailbox.take() == Parcel("", [], ENDING)


async def test_bound_is_enforced() -> None:
    mailbox = Mailbox(max_tokens=4)
    mailbox.put("", [1, 2, 3])
    with pytest.raises(MiniInferError) as caught:
        mailbox.put("", [4, 5])
    assert caught.value.reason is ErrorReason.SLOW_CONSUMER
