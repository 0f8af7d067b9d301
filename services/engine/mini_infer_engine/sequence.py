"""A sequence: the tokens of one stream, the blocks that hold them, and where its time went."""

from __future__ import annotations

import time
from collections.abc import Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np
from mini_infer.logprobs import NO_LOGPROBS
from mini_infer.messages import FinishAccounting, FinishCode
from mini_infer.resolved_sampling import ResolvedSampling
from numpy.typing import NDArray

from mini_infer_engine.logit_bias import LogitBias
from mini_infer_engine.output_grammar import OutputGrammar
from mini_infer_engine.repetition import RepetitionDetector

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
        bias: What its rules add to its logits, or None.
        grammar: Its place in the language of its output, or None.
        allowed_mask: [words] the ids that may be chosen, as in `TokenMasks`; None allows all.
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
        num_told_tokens: Tokens of output that updates have told of, or that were there before.
        num_scored_tokens: Tokens of the prompt, the first one included, whose log-probabilities
            were told.
        num_counted_tokens: Tokens that the sampler has counted in its slot, for penalties.
    """

    __slots__ = (
        "_is_watched",
        "_repetition",
        "_turning_point",
        "allowed_mask",
        "arrival_number",
        "bias",
        "block_names",
        "block_table",
        "cache_scope",
        "deadline",
        "end_ids",
        "grammar",
        "host_blocks",
        "key",
        "max_num_tokens",
        "num_cached_tokens",
        "num_committed_blocks",
        "num_computed_tokens",
        "num_counted_tokens",
        "num_in_flight",
        "num_pending_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_scored_tokens",
        "num_told_tokens",
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
        grammar: OutputGrammar | None = None,
        allowed_mask: NDArray[np.int32] | None = None,
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
            grammar: Of `sampling.grammar`, at its beginning.
            allowed_mask: [words] of `sampling.allowed_token_ids`, as in `TokenMasks`.
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
        # A language admits its end wherever it may end; a sequence that ignores it goes on.
        never = eos_token_ids if grammar is not None and sampling.ignore_eos else ()
        self.bias = LogitBias.of(sampling, self.end_ids, set(never) - self.end_ids)
        self.grammar = grammar
        self.allowed_mask = allowed_mask
        limit = sampling.repetition
        self._repetition = None if limit is None else RepetitionDetector(limit, output_ids)
        self._is_watched = grammar is not None or limit is not None
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
        # What the model thinks of a prompt is not in the cache.
        may_share = not may_turn and sampling.num_prompt_logprobs == NO_LOGPROBS
        self.cache_scope = cache_scope if may_share else None
        self.block_names: list[bytes] = []
        self.num_committed_blocks = 0
        self.num_cached_tokens = 0
        self.num_told_tokens = len(output_ids)
        self.num_scored_tokens = 1
        self.num_counted_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens of output: also the output position of the next one."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_masked(self) -> bool:
        """Whether it chooses from a set of ids."""
        return self.grammar is not None or self.allowed_mask is not None

    @property
    def may_turn(self) -> bool:
        """Whether all of its tokens are turned anew where it grows over some length."""
        return self._turning_point is not None

    @property
    def is_ready(self) -> bool:
        """Whether it can join: its language is compiled, and the prompt that it shares is there."""
        has_grammar = self.grammar is None or self.grammar.is_ready
        return has_grammar and not self.must_wait_for_parent

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

    def begin(self) -> FinishCode:
        """Finds its place in its language, and takes the tokens that must come first.

        Call it each time before the sequence joins; only the first time does anything. A sequence
        whose whole output is one possible text has ended then.

        Raises:
            MiniInferError: GRAMMAR_INVALID where the language cannot be used, or does not hold
                the output that exists.
        """
        if self.grammar is None or self.grammar.has_begun:
            return _RUNNING
        self.grammar.begin(self.token_ids[self.num_prompt_tokens :])
        num_before = self.num_tokens
        code = FinishCode.GRAMMAR if self.grammar.is_complete else self._jump_ahead()
        self._turn_anew(num_before)
        return code

    def advance(self, num_computed: int, token_ids: Seq[int]) -> FinishCode:
        """Takes in what a step did, and says whether the sequence has ended.

        The end ids count at output positions from `min_tokens` on. Tokens that must follow in the
        sequence's language are taken as well; they are not computed yet.

        Args:
            num_computed: Tokens that were computed.
            token_ids: Tokens that were chosen, perhaps none. Those behind the last one of the
                sequence are left out. All but the last are computed as well, unless they have to
                be turned anew.

        Raises:
            MiniInferError: GRAMMAR_INVALID where the language took more than it may.
        """
        known = self.token_ids
        num_before = len(known)
        code = self._append(token_ids)
        num_chosen = len(known) - num_before
        self.num_computed_tokens += num_computed
        if num_chosen > 1:
            self.num_computed_tokens += num_chosen - 1
        if self.grammar is not None and num_chosen and code is _RUNNING:
            code = self._jump_ahead()
        if self._turning_point is not None:
            self._turn_anew(num_before)
        return code

    def _turn_anew(self, num_before: int) -> None:
        """Has all tokens computed anew where the text has grown over its turning point."""
        turning_point = self._turning_point
        if turning_point is not None and num_before <= turning_point < self.num_tokens:
            self.num_turned_together = turning_point + 1
            self.num_computed_tokens = 0

    def accounting(self, now: float, num_steps: int) -> FinishAccounting:
        """Where its time went, at monotonic time `now`, when so many steps have been scheduled."""
        return self.times.accounting(
            now,
            num_steps,
            num_cached_tokens=self.num_cached_tokens,
            num_preemptions=self.num_preemptions,
        )

    def tell(self, num_tokens: int) -> int:
        """Counts tokens of output that an update tells of; gives the position of the first."""
        start = self.num_told_tokens
        self.num_told_tokens = start + num_tokens
        return start

    def take_untold(self) -> tuple[int, list[int]]:
        """The output that no update has told of: its position, and its ids, perhaps none."""
        token_ids = self.token_ids[self.num_prompt_tokens + self.num_told_tokens :]
        return self.tell(len(token_ids)), token_ids

    def _append(self, token_ids: Seq[int]) -> FinishCode:
        """Adds tokens of output up to the one that ends it."""
        known, end_ids = self.token_ids, self.end_ids
        for token_id in token_ids:
            may_end = token_id in end_ids and not self.ends_are_banned
            known.append(token_id)
            if may_end:
                return FinishCode.STOP_TOKEN
            if self._is_watched and (code := self._watch(token_id)) is not _RUNNING:
                return code
            if len(known) >= self.max_num_tokens:
                return FinishCode.LENGTH
        return _RUNNING

    def _watch(self, token_id: int) -> FinishCode:
        """What a token that is just added means for the language, and for repetition."""
        if self.grammar is not None:
            self.grammar.consume(token_id)
            if self.grammar.is_complete:
                return FinishCode.GRAMMAR
        repeats = self._repetition is not None and self._repetition.note(token_id)
        return FinishCode.REPETITION if repeats and not self.ends_are_banned else _RUNNING

    def _jump_ahead(self) -> FinishCode:
        """Takes the tokens that alone can follow; nothing has to be chosen for them."""
        assert self.grammar is not None
        return self._append(self.grammar.forced())

    def __repr__(self) -> str:
        """For people who debug."""
        return f"<Sequence {self.key.stream} {self.status.value} {self.num_tokens} tokens>"
