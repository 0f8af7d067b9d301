"""A sequence: the tokens of one stream, the blocks that hold them, and where its time went."""

from __future__ import annotations

import time
from collections.abc import Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from mini_infer.messages import FinishAccounting, FinishCode
from mini_infer.sampling_params import ResolvedSampling

_RUNNING = FinishCode.RUNNING  # looking up a member of an Enum takes as long as all the rest


class StreamKey(NamedTuple):
    """Names a sequence: the gateway (its ZeroMQ identity, empty in-process) and its stream."""

    owner: bytes
    stream: int


class SequenceStatus(Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True)
class SequenceTimes:
    """Monotonic times (seconds) and step numbers of a sequence's life; None = not yet."""

    arrival: float = field(default_factory=time.monotonic)
    last_preemption: float | None = None
    first_step: float | None = None
    first_token: float | None = None
    first_step_number: int = 0

    @property
    def waiting_since(self) -> float:
        """When it came, or lost its blocks for the last time."""
        return self.arrival if self.last_preemption is None else self.last_preemption

    def note_first_step(self, now: float, step: int) -> None:
        """The sequence joins the running batch; only the first time counts."""
        if self.first_step is None:
            self.first_step = now
            self.first_step_number = step

    def note_token(self, now: float) -> None:
        """The sequence got output; only the first time counts."""
        if self.first_token is None:
            self.first_token = now

    def accounting(
        self, now: float, step: int, *, num_cached_tokens: int, num_preemptions: int
    ) -> FinishAccounting:
        """The record that goes out with the finish code.

        Args:
            now: When the sequence ends.
            step: Number of the last step that ran.
            num_cached_tokens: Prompt tokens that were not computed.
            num_preemptions: Times it lost its blocks.
        """
        ran = self.first_step is not None
        first_step = self.first_step if self.first_step is not None else now
        first_token = self.first_token if self.first_token is not None else now
        return FinishAccounting(
            queue_ms=(first_step - self.arrival) * 1e3,
            prefill_ms=(first_token - first_step) * 1e3,
            decode_ms=(now - first_token) * 1e3,
            num_cached_tokens=num_cached_tokens,
            num_preemptions=num_preemptions,
            num_steps=max(1, step - self.first_step_number + 1) if ran else 0,
        )


class Sequence:
    """One stream in the engine.

    `num_computed_tokens` alone says what is to be done next: tokens from there to `num_tokens`
    have no K and V yet, be they a prompt, a resumed output, or the token sampled last.

    Attributes:
        key: Who asked.
        token_ids: Prompt and output.
        num_prompt_tokens: Length of the prompt.
        max_num_tokens: Tokens that it can come to have.
        num_turned_together: Tokens at the front whose keys are turned for one length of text,
            theirs; each later one is turned for the length up to itself. Matters where rotary
            embeddings depend on that length (`layers/rotary.py`).
        sampling: How to choose and when to stop.
        end_ids: Ids that end the sequence: its stop ids, and the model's unless ignored.
        deadline: Monotonic time at which it ends, or None.
        priority: Its class; lower ones run first.
        rank: The class that it has come to have by waiting (`waiting_queue.py`).
        arrival_number: Its place among all sequences, in the order in which they came.
        parent: The sequence whose prompt it shares, until it has joined; or None.
        status: Where it is.
        num_pending_tokens: Tokens that it is expected to compute when it joins, as it looked when
            it began to wait.
        was_running: Whether it has lost its blocks since it first ran.
        slot: Its row of the running batch's columns, while it runs.
        num_in_flight: Launched steps that name it.
        num_computed_tokens: Tokens whose K and V are in the cache, or in `host_blocks`.
        num_preemptions: Times it lost its blocks.
        times: Where its time went.
        block_table: Blocks of its tokens, in order.
        host_blocks: Blocks of the host that hold its K and V while it is swapped out.
        cache_scope: What must be equal, beside the text, where prefixes are shared; None shares
            none.
        block_names: Names of its full blocks, as far as they were needed.
        num_committed_blocks: Blocks of its table that were offered to the prefix cache.
        num_cached_tokens: Prompt tokens that were not computed, when it first joined.
    """

    __slots__ = (
        "_turning_point",
        "arrival_number",
        "block_names",
        "block_table",
        "cache_scope",
        "deadline",
        "end_ids",
        "host_blocks",
        "key",
        "max_num_tokens",
        "num_cached_tokens",
        "num_committed_blocks",
        "num_computed_tokens",
        "num_in_flight",
        "num_pending_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_turned_together",
        "parent",
        "priority",
        "rank",
        "sampling",
        "slot",
        "status",
        "times",
        "token_ids",
        "was_running",
    )

    def __init__(
        self,
        key: StreamKey,
        prompt_ids: Seq[int],
        sampling: ResolvedSampling,
        *,
        eos_token_ids: Collection[int],
        output_ids: Seq[int] = (),
        deadline: float | None = None,
        priority: int = 0,
        turning_point: int | None = None,
        cache_scope: tuple[str, ...] | None = None,
        parent: Sequence | None = None,
    ) -> None:
        """Makes a sequence that waits.

        Args:
            key: Who asked.
            prompt_ids: At least one id.
            sampling: Resolved parameters.
            eos_token_ids: The model's end-of-sequence ids.
            output_ids: Output that exists already and is not delivered again.
            deadline: Monotonic time at which it ends, or None.
            priority: Its class; lower ones run first.
            turning_point: Length of text behind which all of its tokens are turned anew, or None.
            cache_scope: What must be equal, beside the text, where prefixes are shared; or None.
            parent: A sequence with the same prompt, whose blocks it shares where it can.
        """
        self.key = key
        self.token_ids = [*prompt_ids, *output_ids]
        self.num_prompt_tokens = len(prompt_ids)
        self.max_num_tokens = len(prompt_ids) + sampling.max_tokens
        # One that may be turned anew writes its blocks again, so it shares none.
        may_turn = turning_point is not None and (
            len(prompt_ids) <= turning_point < self.max_num_tokens
        )
        self._turning_point = turning_point
        self.num_turned_together = len(prompt_ids)
        if turning_point is not None and len(prompt_ids) <= turning_point < self.num_tokens:
            self.num_turned_together = turning_point + 1
        self.sampling = sampling
        model_ends = () if sampling.ignore_eos else eos_token_ids
        self.end_ids = frozenset(sampling.stop_token_ids).union(model_ends)
        self.deadline = deadline
        self.priority = self.rank = priority
        self.arrival_number = 0
        self.parent = None if may_turn else parent
        self.status = SequenceStatus.WAITING
        self.num_pending_tokens = self.num_tokens
        self.was_running = False
        self.slot = -1
        self.num_in_flight = 0
        self.num_computed_tokens = 0
        self.num_preemptions = 0
        self.times = SequenceTimes()
        if parent is not None:
            self.times.arrival = parent.times.arrival  # they wait and age together
        self.block_table: list[int] = []
        self.host_blocks: list[int] = []
        self.cache_scope = None if may_turn else cache_scope
        self.block_names: list[bytes] = []
        self.num_committed_blocks = 0
        self.num_cached_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens of output: also the output position of the next one."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def must_wait_for_parent(self) -> bool:
        """Whether the prompt that it shares is just being computed."""
        parent = self.parent
        return (
            parent is not None
            and parent.status is SequenceStatus.RUNNING
            and parent.num_computed_tokens < self.num_prompt_tokens
        )

    @property
    def ends_are_banned(self) -> bool:
        """Whether the next token must not be one of `end_ids`."""
        return self.num_output_tokens < self.sampling.min_tokens

    def advance(self, num_computed: int, token_ids: Seq[int]) -> FinishCode:
        """Takes in what a step did, and says whether the sequence has ended.

        The end ids count at output positions from `min_tokens` on.

        Args:
            num_computed: Tokens that were computed.
            token_ids: Tokens that were chosen, perhaps none. Those behind the last one of the
                sequence are left out. All but the last are computed as well, unless they have to
                be turned anew.
        """
        known, end_ids = self.token_ids, self.end_ids
        num_before = len(known)
        code = _RUNNING
        for token_id in token_ids:
            may_end = token_id in end_ids and not self.ends_are_banned
            known.append(token_id)
            if may_end:
                code = FinishCode.STOP_TOKEN
                break
            if len(known) >= self.max_num_tokens:
                code = FinishCode.LENGTH
                break
        self.num_computed_tokens += num_computed + max(0, len(known) - num_before - 1)
        turning_point = self._turning_point
        if turning_point is not None and num_before <= turning_point < len(known):
            self.num_turned_together = turning_point + 1
            self.num_computed_tokens = 0
        return code

    def __repr__(self) -> str:
        """For people who debug."""
        return f"<Sequence {self.key.stream} {self.status.value} {self.num_tokens} tokens>"
