"""A sequence's place in the language that its output must belong to."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from enum import Enum

from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer_tokenizer.grammar import MAX_FORCED_TOKENS, Matcher


class Forced(Enum):
    """What happens where the language admits a single text, and so its tokens are known."""

    TAKEN = "taken"
    """They are taken at once, without being chosen; of a long run of them so many at a step."""
    ONLY_CHOICE = "only choice"
    """Each is chosen, and is the only one that may be: the output is the same as with TAKEN."""
    CHOSEN_FREELY = "chosen freely"
    """Any tokens of that text may be chosen."""


class OutputGrammar:
    """Follows the output of one sequence. Of the loop's thread."""

    def __init__(
        self, compile_it: Callable[[], Future[Matcher]], forced: Forced = Forced.TAKEN
    ) -> None:
        """Compiles nothing yet.

        Args:
            compile_it: Begins to compile the language, for this sequence alone.
            forced: What happens to tokens that must follow.
        """
        self._compile_it = compile_it
        self._compiled: Future[Matcher] | None = None
        self._forced = forced
        self._has_more = False  # whether forced tokens may follow those taken last
        self._matcher: Matcher | None = None

    def compile(self) -> None:
        """Begins to compile the language, beside the loop."""
        self._compiled = self._compile_it()

    def cancel(self) -> None:
        """Takes it back where it has not begun: the sequence has ended."""
        if self._compiled is not None:
            self._compiled.cancel()

    @property
    def has_begun(self) -> bool:
        """Whether it follows the output."""
        return self._matcher is not None

    @property
    def is_ready(self) -> bool:
        """Whether the language is compiled, or cannot be."""
        return self._compiled is not None and self._compiled.done()

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
        assert self._compiled is not None
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
        """The tokens that must follow and are taken at once; a bounded number of them."""
        if self._forced is not Forced.TAKEN:
            return []
        token_ids = self.matcher.forced()
        self._has_more = len(token_ids) == MAX_FORCED_TOKENS
        return token_ids

    def only_choice(self) -> int | None:
        """The one token that may be chosen now, where that is so."""
        may_be_forced = self._has_more or self._forced is Forced.ONLY_CHOICE
        return self.matcher.next_forced() if may_be_forced else None

    def problem(self) -> MiniInferError:
        """Why the output cannot go on."""
        cause = self.matcher.error or "the output does not belong to the language"
        return MiniInferError(ErrorReason.GRAMMAR_INVALID, f"structured output: {cause}")
