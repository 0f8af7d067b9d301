"""A step while it is being scheduled, and while it is under way."""

from __future__ import annotations

from dataclasses import dataclass, field

from mini_infer_engine.sequence import Sequence
from mini_infer_engine.step_costs import StepWork


@dataclass(slots=True)
class StepPlan:
    """Who takes part in the step that is being scheduled.

    Attributes:
        decodes: Sequences of which one token is left to compute.
        work: What all that take part come to.
        prefills: The other ones, each with how many of its tokens.
    """

    decodes: list[Sequence]
    work: StepWork
    prefills: list[tuple[Sequence, int]] = field(default_factory=list)

    @classmethod
    def of(cls, decodes: list[Sequence]) -> StepPlan:
        """A step that others may join."""
        num_context_tokens = sum([each.num_computed_tokens for each in decodes])
        return cls(decodes, StepWork(len(decodes), num_context_tokens))

    @classmethod
    def ahead(cls, sequences: list[Sequence]) -> StepPlan:
        """Who decodes in a step behind one that computes all tokens that are known of them."""
        num_context_tokens = sum([each.num_tokens for each in sequences])
        return cls(sequences, StepWork(len(sequences), num_context_tokens))

    @property
    def is_empty(self) -> bool:
        """Whether nobody takes part."""
        return not self.decodes and not self.prefills

    def give(self, sequence: Sequence, most: int) -> None:
        """Lets a sequence have what is left of it, at most so many tokens (at least one)."""
        num_context_tokens = sequence.num_computed_tokens
        num_left = sequence.num_tokens - num_context_tokens
        if num_left == 1:
            self.decodes.append(sequence)
            self.work = self.work.with_row(num_context_tokens)
        else:
            count = min(num_left, most)
            self.prefills.append((sequence, count))
            self.work = self.work.with_chunk(count, num_context_tokens)

    def launch(self, num_swapped_blocks: int, now: float) -> LaunchedStep:
        """The step as it begins; from now on it names its sequences."""
        sequences = [*self.decodes, *(sequence for sequence, _ in self.prefills)]
        num_tokens = [1] * len(self.decodes) + [count for _, count in self.prefills]
        for sequence in sequences:
            sequence.num_in_flight += 1
        work = self.work._replace(num_swapped_blocks=num_swapped_blocks)
        return LaunchedStep(sequences, num_tokens, work, now)


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step under way.

    Attributes:
        sequences: [S] its rows.
        num_scheduled_tokens: [S] tokens of each.
        work: What it does, swaps included.
        started: Monotonic time at which it was scheduled.
    """

    sequences: list[Sequence]
    num_scheduled_tokens: list[int]
    work: StepWork
    started: float
