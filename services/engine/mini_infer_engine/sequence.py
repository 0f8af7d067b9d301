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
    first_step: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    first_step_number: int = 0
    last_step_number: int = 0

    def note_step(self, step: int) -> None:
        """The sequence takes part in a step."""
        if self.first_step is None:
            self.first_step = time.monotonic()
            self.first_step_number = step
        self.last_step_number = step

    def note_tokens(self, now: float) -> None:
        """The sequence got output."""
        if self.first_token is None:
            self.first_token = now
        self.last_token = now

    def accounting(self, num_preemptions: int) -> FinishAccounting:
        """The record that goes out with the finish code."""
        end = time.monotonic()
        first_step = self.first_step if self.first_step is not None else end
        first_token = self.first_token if self.first_token is not None else end
        last_token = self.last_token if self.last_token is not None else end
        ran = self.first_step is not None
        return FinishAccounting(
            queue_ms=(first_step - self.arrival) * 1e3,
            prefill_ms=(first_token - first_step) * 1e3,
            decode_ms=(last_token - first_token) * 1e3,
            num_cached_tokens=0,
            num_preemptions=num_preemptions,
            num_steps=self.last_step_number - self.first_step_number + 1 if ran else 0,
        )


class Sequence:
    """One stream in the engine.

    `num_computed_tokens` alone says what is to be done next: tokens from there to `num_tokens`
    have no K and V yet, be they a prompt, a resumed output, or the token sampled last.

    Attributes:
        key: Who asked.
        token_ids: Prompt and output.
        num_prompt_tokens: Length of the prompt.
        num_turned_together: Tokens at the front whose keys are turned for one length of text,
            theirs; each later one is turned for the length up to itself. Matters where rotary
            embeddings depend on that length (`layers/rotary.py`).
        sampling: How to choose and when to stop.
        end_ids: Ids that end the sequence: its stop ids, and the model's unless ignored.
        deadline: Monotonic time at which it ends, or None.
        block_table: Blocks of its tokens, in order.
        num_computed_tokens: Tokens whose K and V are in the cache.
        num_in_flight: Launched steps that name it.
        status: Which queue it is in.
        times: Where its time went.
        num_preemptions: Times it lost its blocks.
    """

    __slots__ = (
        "_turning_point",
        "block_table",
        "deadline",
        "end_ids",
        "key",
        "num_computed_tokens",
        "num_in_flight",
        "num_preemptions",
        "num_prompt_tokens",
        "num_turned_together",
        "sampling",
        "status",
        "times",
        "token_ids",
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
        turning_point: int | None = None,
    ) -> None:
        """Makes a sequence that waits.

        Args:
            key: Who asked.
            prompt_ids: At least one id.
            sampling: Resolved parameters.
            eos_token_ids: The model's end-of-sequence ids.
            output_ids: Output that exists already and is not delivered again.
            deadline: Monotonic time at which it ends, or None.
            turning_point: Length of text behind which all of its tokens are turned anew, or None.
        """
        self.key = key
        self.token_ids = [*prompt_ids, *output_ids]
        self.num_prompt_tokens = len(prompt_ids)
        self._turning_point = turning_point
        self.num_turned_together = len(prompt_ids)
        if turning_point is not None and len(prompt_ids) <= turning_point < self.num_tokens:
            self.num_turned_together = turning_point + 1
        self.sampling = sampling
        model_ends = () if sampling.ignore_eos else eos_token_ids
        self.end_ids = frozenset(sampling.stop_token_ids).union(model_ends)
        self.deadline = deadline
        self.block_table: list[int] = []
        self.num_computed_tokens = 0
        self.num_in_flight = 0
        self.status = SequenceStatus.WAITING
        self.times = SequenceTimes()
        self.num_preemptions = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens of output: also the output position of the next one."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def max_num_tokens(self) -> int:
        """Tokens that it can come to have."""
        return self.num_prompt_tokens + self.sampling.max_tokens

    @property
    def ends_are_banned(self) -> bool:
        """Whether the next token must not be one of `end_ids`."""
        return self.num_output_tokens < self.sampling.min_tokens

    def append(self, token_id: int) -> FinishCode:
        """Adds an output token and says whether it is the last.

        The end ids count at output positions from `min_tokens` on.
        """
        may_end = not self.ends_are_banned
        self.token_ids.append(token_id)
        if len(self.token_ids) - 1 == self._turning_point:
            self.num_turned_together = len(self.token_ids)
        if may_end and token_id in self.end_ids:
            return FinishCode.STOP_TOKEN
        if self.num_output_tokens >= self.sampling.max_tokens:
            return FinishCode.LENGTH
        return FinishCode.RUNNING

    def __repr__(self) -> str:
        """For people who debug."""
        return f"<Sequence {self.key.stream} {self.status.value} {self.num_tokens} tokens>"
