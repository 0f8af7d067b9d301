"""What a step did, sequence by sequence or in columns: what the scheduler tells the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from mini_infer.errors import MiniInferError
from mini_infer.logprobs import LogprobColumns
from mini_infer.messages import NO_STOP_TOKEN, FinishAccounting, FinishCode

from mini_infer_engine.sequence import StreamKey


@dataclass(frozen=True, slots=True)
class SequenceUpdate:
    """What a step did for one sequence.

    Attributes:
        key: The sequence.
        start: Output position of the first of
        token_ids: its new ids, perhaps none.
        finish_code: How it ended, or RUNNING.
        stop_token_id: The id that ended it, or `NO_STOP_TOKEN`.
        accounting: Where its time went, once it has ended.
        error: Why it failed. A failed sequence has no finish code.
        logprobs: Those of the ids, where they are wanted.
        prompt_logprobs: Those of tokens of the prompt, behind those told before.
    """

    key: StreamKey
    start: int
    token_ids: list[int] = field(default_factory=list)
    finish_code: FinishCode = FinishCode.RUNNING
    stop_token_id: int = NO_STOP_TOKEN
    accounting: FinishAccounting | None = None
    error: MiniInferError | None = None
    logprobs: LogprobColumns | None = None
    prompt_logprobs: LogprobColumns | None = None


class SequenceEnd(NamedTuple):
    """How a sequence ended well: the code, the stop id or `NO_STOP_TOKEN`, where its time went."""

    code: FinishCode
    stop_token_id: int
    accounting: FinishAccounting


@dataclass(slots=True)
class StepUpdates:
    """The updates of a step in columns: a row for each sequence that got tokens or ended well.

    Attributes:
        keys: The rows' sequences.
        starts: Output position of each row's first id.
        token_ids: The ids of each row.
        ends: By row, how the sequences that ended did so.
        failures: Sequences without a row: those that failed, and why.
        logprobs: Those of the ids of a sequence's row, where they are wanted. Of sequences without
            a row they mean nothing.
        prompt_logprobs: Of tokens of prompts: whose prompt, index of the first one, and those of it
            and of the tokens behind it.
    """

    keys: list[StreamKey] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    ends: dict[int, SequenceEnd] = field(default_factory=dict)
    failures: list[tuple[StreamKey, MiniInferError]] = field(default_factory=list)
    logprobs: dict[StreamKey, LogprobColumns] = field(default_factory=dict)
    prompt_logprobs: list[tuple[StreamKey, int, LogprobColumns]] = field(default_factory=list)

    def add(
        self, key: StreamKey, start: int, token_ids: list[int], end: SequenceEnd | None = None
    ) -> None:
        """Adds a row."""
        if end is not None:
            self.ends[len(self.keys)] = end
        self.keys.append(key)
        self.starts.append(start)
        self.token_ids.append(token_ids)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not (self.keys or self.failures or self.prompt_logprobs)

    @property
    def num_tokens(self) -> int:
        """Ids of all rows."""
        return sum(map(len, self.token_ids))

    def rows(self) -> Iterator[tuple[StreamKey, int, list[int], SequenceEnd | None]]:
        """The rows one by one, as `add` takes them."""
        for index, key in enumerate(self.keys):
            yield key, self.starts[index], self.token_ids[index], self.ends.get(index)

    def __iter__(self) -> Iterator[SequenceUpdate]:
        """The updates one by one."""
        for key, _, columns in self.prompt_logprobs:
            yield SequenceUpdate(key, 0, prompt_logprobs=columns)
        for key, start, token_ids, end in self.rows():
            logprobs = self.logprobs.get(key)
            if end is None:
                yield SequenceUpdate(key, start, token_ids, logprobs=logprobs)
            else:
                yield SequenceUpdate(key, start, token_ids, *end, logprobs=logprobs)
        for key, error in self.failures:
            yield SequenceUpdate(key, 0, error=error)
