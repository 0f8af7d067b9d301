"""A sequence's place in the language that its output must belong to."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from concurrent.futures import Future
from enum import Enum
from typing import TYPE_CHECKING

from mini_infer.errors import ErrorReason, MiniInferError

if TYPE_CHECKING:
    from mini_infer_tokenizer.grammar import Matcher


class Forced(Enum):
    """What happens where the language admits a single text, and so its tokens are known."""

    TAKEN = "taken"
    """They are taken at once, without being chosen."""
    ONLY_CHOICE = "only choice"
    """Each is chosen, and is the only one that may be: the output is the same as with TAKEN."""
    CHOSEN_FREELY = "chosen freely"
    """Any tokens of that text may be chosen."""


class OutputGrammar:
    """Follows the output of one sequence. Of the loop's thread.

    Attributes:
        has_begun: Whether `begin` was called.
    """

    def __init__(self, compiled: Future[Matcher], forced: Forced = Forced.TAKEN) -> None:
        """Takes a language that is being compiled.

        Args:
            compiled: The language at its beginning, of this sequence alone; or the error.
            forced: What happens to tokens that must follow.
        """
        self._compiled = compiled
        self._forced = forced
        self._matcher: Matcher | None = None

    @property
    def has_begun(self) -> bool:
        """Whether it follows the output."""
        return self._matcher is not None

    @property
    def is_ready(self) -> bool:
        """Whether the language is compiled, or cannot be."""
        return self._compiled.done()

    @property
    def matcher(self) -> Matcher:
        """The place in the language. Only once it has begun."""
        assert self._matcher is not None
        return self._matcher

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end can follow."""
        return self.matcher.is_complete

    def begin(self, output_ids: Seq[int]) -> None:
        """Goes to the place behind output that exists already.

        Raises:
            MiniInferError: GRAMMAR_INVALID where the language cannot be compiled, or does not hold
                this output.
        """
        self._matcher = self._compiled.result()
        for token_id in output_ids:
            self.consume(token_id)

    def consume(self, token_id: int) -> None:
        """Takes the next token of output in.

        Raises:
            MiniInferError: GRAMMAR_INVALID where it cannot follow, or the language took more than
                it may.
        """
        if self.matcher.advance([token_id]) != 1:
            raise self.problem()

    def forced(self) -> list[int]:
        """The tokens that must follow and are taken at once."""
        return self.matcher.forced() if self._forced is Forced.TAKEN else []

    def only_choice(self) -> int | None:
        """The one token that may be chosen now, where that is so."""
        if self._forced is not Forced.ONLY_CHOICE:
            return None
        return next(iter(self.matcher.forced()), None)

    def problem(self) -> MiniInferError:
        """Why the output cannot go on."""
        cause = self.matcher.error or "the output does not belong to the language"
        return MiniInferError(ErrorReason.GRAMMAR_INVALID, f"structured output: {cause}")
