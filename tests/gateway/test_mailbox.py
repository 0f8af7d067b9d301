from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer_gateway.mailbox import Ending, EndReason, Mailbox, Parcel

ENDING = Ending(reason=EndReason.LENGTH, num_output_tokens=0)
MAX_CHOICES = 3
PUTS = st.tuples(st.integers(0, MAX_CHOICES - 1), st.integers(0, 5))
STEPS = st.lists(PUTS | st.just("let the client take"), max_size=60)


@given(steps=STEPS, min_tokens=st.integers(1, 8))
def test_nothing_is_lost_or_reordered(steps: list[tuple[int, int] | str], min_tokens: int) -> None:
    """Puts of some ids of some choice, with takes in between wherever the client keeps up."""

    async def run() -> list[Parcel]:
        mailbox = Mailbox(MAX_CHOICES, min_tokens)
        parcels: list[Parcel] = []

        async def client() -> None:
            while sum(parcel.end is not None for parcel in parcels) < MAX_CHOICES:
                parcels.append(await mailbox.take())

        task = asyncio.create_task(client())
        positions = [0] * MAX_CHOICES
        for step in steps:
            if isinstance(step, tuple):
                choice, count = step
                ids = list(range(positions[choice], positions[choice] + count))
                mailbox.put(choice, "".join(f"{each}," for each in ids), ids)
                positions[choice] += count
            else:
                await asyncio.sleep(0)
        for choice in range(MAX_CHOICES):
            mailbox.end(choice, ENDING)
        await task
        return parcels

    parcels = asyncio.run(run())
    for choice in range(MAX_CHOICES):
        total = sum(step[1] for step in steps if isinstance(step, tuple) and step[0] == choice)
        own = [parcel for parcel in parcels if parcel.choice_index == choice]
        assert [each for parcel in own for each in parcel.token_ids] == list(range(total))
        assert [parcel.end for parcel in own] == [None] * (len(own) - 1) + [ENDING]
        assert all(len(parcel.token_ids) >= min_tokens for parcel in own[:-1])
    for parcel in parcels:
        assert parcel.text == "".join(f"{each}," for each in parcel.token_ids)


async def test_what_waits_is_taken_as_one() -> None:
    mailbox = Mailbox()
    mailbox.put(0, "a", [1])
    mailbox.put(0, "bc", [2, 3])
    mailbox.end(0, ENDING)
    assert await mailbox.take() == Parcel(0, "abc", [1, 2, 3], ENDING)


async def test_choices_take_turns_however_much_one_makes() -> None:
    mailbox = Mailbox(3)
    order = []
    for _ in range(6):
        for choice in (0, 0, 0, 2, 1):
            mailbox.put(choice, "", [choice])
        order.append((await mailbox.take()).choice_index)
    assert order == [0, 2, 1, 0, 2, 1]


async def test_first_end_counts_and_closes() -> None:
    mailbox = Mailbox()
    mailbox.end(0, ENDING)
    mailbox.end(0, MiniInferError(ErrorReason.ENGINE_LOST, "later"))
    mailbox.put(0, "x", [1])
    assert await mailbox.take() == Parcel(0, "", [], ENDING)


async def test_rest_is_taken_however_little_it_is() -> None:
    mailbox = Mailbox(4, min_tokens=5)
    mailbox.put(0, "a", [1])
    mailbox.put(2, "b", [2])
    mailbox.end(2, ENDING)
    mailbox.end(3, ENDING)
    rest = sorted(mailbox.take_rest(), key=lambda parcel: parcel.choice_index)
    assert rest == [
        Parcel(0, "a", [1], None),
        Parcel(2, "b", [2], ENDING),
        Parcel(3, "", [], ENDING),
    ]
    assert mailbox.take_rest() == []
    mailbox.put(0, "c", [3] * 5)
    assert await mailbox.take() == Parcel(0, "c", [3] * 5, None)


async def test_bound_is_of_all_choices_and_of_what_waits() -> None:
    mailbox = Mailbox(2, max_tokens=4)
    mailbox.put(0, "", [1, 2])
    mailbox.put(1, "", [3])
    with pytest.raises(MiniInferError) as caught:
        mailbox.put(1, "", [4, 5])
    assert caught.value.reason is ErrorReason.SLOW_CONSUMER
    await mailbox.take()
    mailbox.put(1, "", [4, 5])
