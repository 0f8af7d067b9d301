from __future__ import annotations

import asyncio
from typing import Any

import pytest
from gateway.harness import thoughts
from hypothesis import given
from hypothesis import strategies as st
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.logprobs import joined
from mini_infer_gateway.mailbox import MAX_PARCEL_TOKENS, Ending, EndReason, Mailbox, Parcel

ENDING = Ending(reason=EndReason.LENGTH, num_output_tokens=0)
MAX_CHOICES = 3
NUM_TOP = 2
PROMPT = thoughts(1, range(2000), NUM_TOP)
PUTS = st.tuples(st.integers(0, MAX_CHOICES - 1), st.sampled_from([0, 1, 2, 5, 700]))
PROMPT_PUTS = st.sampled_from([-1, -512, -513, -1100])
STEPS = st.lists(PUTS | PROMPT_PUTS | st.just("let the client take"), max_size=60)


class Feed:
    """Puts that go on where the put before ended: ids of each choice from 0, the prompt from 1."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox
        self.num_put = [0] * MAX_CHOICES
        self.num_prompt = 0

    def put(self, choice: int, count: int) -> None:
        start = self.num_put[choice]
        ids = list(range(start, start + count))
        text = "".join(f"{each}," for each in ids)
        self.mailbox.put(choice, text, ids, thoughts(start, ids, NUM_TOP) if count else None)
        self.num_put[choice] += count

    def put_prompt(self, count: int) -> None:
        """Of choice 0, as long as it has no output."""
        if self.num_put[0] == 0:
            start = self.num_prompt
            part = PROMPT.part(start, min(start + count, PROMPT.num_tokens))
            self.mailbox.put_prompt(0, 1 + start, part)
            self.num_prompt += part.num_tokens


async def all_parcels(steps: list[Any], min_tokens: int) -> tuple[Feed, list[Parcel]]:
    """Runs steps, with takes in between wherever the client keeps up; then ends each choice."""
    mailbox = Mailbox(MAX_CHOICES, min_tokens)
    feed, parcels = Feed(mailbox), []

    async def client() -> None:
        while sum(parcel.end is not None for parcel in parcels) < MAX_CHOICES:
            parcels.append(await mailbox.take())

    task = asyncio.create_task(client())
    for step in steps:
        if isinstance(step, tuple):
            feed.put(*step)
        elif isinstance(step, int):
            feed.put_prompt(-step)
        else:
            await asyncio.sleep(0)
    for choice in range(MAX_CHOICES):
        mailbox.end(choice, ENDING)
    await task
    return feed, parcels


@given(steps=STEPS, min_tokens=st.integers(1, 8) | st.just(MAX_PARCEL_TOKENS))
def test_nothing_is_lost_or_reordered(steps: list[Any], min_tokens: int) -> None:
    """Puts of some ids of some choice, or of a part of the prompt."""
    feed, parcels = asyncio.run(all_parcels(steps, min_tokens))
    for choice in range(MAX_CHOICES):
        own = [parcel for parcel in parcels if parcel.choice_index == choice]
        ids = [each for parcel in own for each in parcel.token_ids]
        assert ids == list(range(feed.num_put[choice]))
        assert [parcel.end for parcel in own] == [None] * (len(own) - 1) + [ENDING]
        output = [parcel for parcel in own if parcel.prompt is None]
        assert all(len(parcel.token_ids) >= min_tokens for parcel in output[:-1])
        # What comes last into a parcel may be large; nothing is added to what is large.
        assert all(len(parcel.token_ids) < MAX_PARCEL_TOKENS + 700 for parcel in output)
        assert own[: len(own) - len(output)] == [each for each in own if each.prompt]
    for parcel in parcels:
        ids = parcel.token_ids
        assert parcel.text == "".join(f"{each}," for each in ids)
        assert parcel.logprobs == (thoughts(ids[0], ids, NUM_TOP) if ids else None)
        assert not (ids and parcel.prompt)
    told = [parcel.prompt for parcel in parcels if parcel.prompt]
    assert all(each.logprobs.num_tokens <= 512 for each in told)
    starts = [each.start for each in told]
    assert starts == [
        1 + sum(part.logprobs.num_tokens for part in told[:i]) for i in range(len(told))
    ]
    if told:
        assert joined([each.logprobs for each in told]) == PROMPT.part(0, feed.num_prompt)
    assert bool(told) == (feed.num_prompt > 0)


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


async def test_much_output_of_a_choice_leaves_in_turns_with_others() -> None:
    mailbox = Mailbox(2)
    for position in range(3 * MAX_PARCEL_TOKENS):
        mailbox.put(0, "a", [position])
    mailbox.put(1, "b", [1])
    taken = [await mailbox.take() for _ in range(4)]
    assert [(each.choice_index, len(each.token_ids)) for each in taken] == [
        (0, MAX_PARCEL_TOKENS),
        (1, 1),
        (0, MAX_PARCEL_TOKENS),
        (0, MAX_PARCEL_TOKENS),
    ]


async def test_what_is_complete_is_taken_however_little_it_is() -> None:
    mailbox = Mailbox(min_tokens=10)
    for position in range(MAX_PARCEL_TOKENS + 1):
        mailbox.put(0, "", [position])
    mailbox.complete(0)
    assert len((await mailbox.take()).token_ids) == MAX_PARCEL_TOKENS
    assert (await mailbox.take()).token_ids == [MAX_PARCEL_TOKENS]


async def test_bound_is_of_prompt_and_output_together() -> None:
    mailbox = Mailbox(max_tokens=4)
    mailbox.put_prompt(0, 1, PROMPT.part(0, 3))
    mailbox.put(0, "", [1])
    for put in (
        lambda: mailbox.put(0, "", [2]),
        lambda: mailbox.put_prompt(0, 4, PROMPT.part(3, 4)),
    ):
        with pytest.raises(MiniInferError) as caught:
            put()
        assert caught.value.reason is ErrorReason.SLOW_CONSUMER
    assert (await mailbox.take()).prompt is not None
    mailbox.put(0, "", [2, 3, 4])
    with pytest.raises(MiniInferError):
        mailbox.put(0, "", [5])
