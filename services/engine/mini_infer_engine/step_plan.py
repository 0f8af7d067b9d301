"""A step while it is being scheduled, and while it is under way."""

from __future__ import annotations

from dataclasses import dataclass, field

from mini_infer_engine.sequence import Sequence


@dataclass(slots=True)
class StepPlan:
    """Who takes part in the step that is being scheduled.

    Attributes:
        decodes: Sequences of which one token is left to compute.
        prefills: The other ones, each with how many of its tokens.
        budget: Tokens that can still be given out, the decoding ones aside.
    """

    decodes: list[Sequence] = field(default_factory=list)
    prefills: list[tuple[Sequence, int]] = field(default_factory=list)
    budget: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether nobody takes part."""
        return not self.decodes and not self.prefills

    def give(self, sequence: Sequence) -> None:
        """Lets a sequence have what is left of it, as far as the budget goes."""
        num_left = sequence.num_tokens - sequence.num_computed_tokens
        if num_left == 1:
            self.decodes.append(sequence)
        else:
            num_left = min(num_left, self.budget)
            self.prefills.append((sequence, num_left))
        self.budget -= num_left

    def launch(self, num_swapped_blocks: int, now: float) -> LaunchedStep:
        """The step as it begins; from now on it names its sequences."""
        sequences = [*self.decodes, *(sequence for sequence, _ in self.prefills)]
        num_tokens = [1] * len(self.decodes) + [count for _, count in self.prefills]
        for sequence in sequences:
            sequence.num_in_flight += 1
        return LaunchedStep(sequences, num_tokens, num_swapped_blocks, now)


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step under way.

    Attributes:
        sequences: [S] its rows.
        num_scheduled_tokens: [S] tokens of each.
        num_swapped_blocks: Blocks that are copied between device and host before.
        started: Monotonic time at which it was scheduled.
    """

    sequences: list[Sequence]
    num_scheduled_tokens: list[int]
    num_swapped_blocks: int
    started: float
