"""What tests of sampling share: an engine driven by hand, what it told, and near-ties of draws.

Logits of the same text differ in their last bits with the shape of the batch that computed them,
so a draw may differ where its race is that close, or where a probability lies that close to a
bound. `DrawComparison` admits a difference only where draws from the logits of `transformers`,
changed by no more than two correct implementations differ, give both tokens; and few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import partial

import msgspec
import numpy as np
import torch
from greedy_reference import NEAR_TIE, TOKENS_PER_NEAR_TIE, GreedyReference
from mini_infer.errors import MiniInferError
from mini_infer.logprobs import TokenLogprobs
from mini_infer.messages import FinishCode
from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer_engine.block_manager import BlockTransfers
from mini_infer_engine.build import Engine
from mini_infer_engine.running_batch import RunningBatch
from mini_infer_engine.sampling import Sampler
from mini_infer_engine.sequence import Sequence, StreamKey
from mini_infer_engine.step_costs import StepCoefficients, StepCosts
from mini_infer_engine.step_updates import SequenceUpdate
from mini_infer_kernels.sampling_kernels import REFERENCE_SAMPLING

LOGPROB_TOLERANCE = NEAR_TIE
"""Between a log-probability of ours and one of `transformers`. On the demo model its float32 and
float64 alone differ by up to 3e-5, and ours by up to 5e-5 from either."""
MEAN_LOGPROB_TOLERANCE = 2e-5
DISTURBANCE = NEAR_TIE
"""Change of logits within which either of two draws is admitted."""
_NUM_DISTURBED = 64


@dataclass
class Told:
    """What came of one sequence.

    Attributes:
        token_ids: Its output, without what was there before.
        logprobs: Of the output.
        prompt_logprobs: In the order in which they came.
        prompt_starts: Index in the prompt of the first one of each portion of them.
        code: How it ended.
        error: Why it failed.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_starts: list[int] = field(default_factory=list)
    code: FinishCode = FinishCode.RUNNING
    error: MiniInferError | None = None

    def receive(self, update: SequenceUpdate) -> None:
        """Takes in what a step did, but for the prompt."""
        self.token_ids += update.token_ids
        if update.logprobs is not None:
            self.logprobs += update.logprobs.tokens()
        self.code = update.finish_code or self.code
        self.error = update.error or self.error


def run_sequences(
    engine: Engine, groups: Iterable[Seq[Sequence]], before_step: Callable[[], None] = lambda: None
) -> dict[StreamKey, Told]:
    """Runs groups of sequences, each of one prompt, to their ends.

    Args:
        engine: Idle.
        groups: All of them queue at once.
        before_step: Called before each step.
    """
    scheduler, served = engine.scheduler, engine.served
    told: dict[StreamKey, Told] = {}
    for group in groups:
        scheduler.add(*group, now=0.0)
        told.update((each.key, Told()) for each in group)
    now = 0.0
    while not scheduler.is_idle:
        now += 0.01
        before_step()
        batch = scheduler.schedule(now)
        masked = scheduler.masked_sequences(batch)
        tokens = engine.runner.run(batch, partial(served.fill_masks, masked))
        updates = scheduler.finish_step(batch, tokens, now)
        for key, start, columns in updates.prompt_logprobs:
            told[key].prompt_starts.append(start)
            told[key].prompt_logprobs += columns.tokens()
        for update in updates:
            told[update.key].receive(update)
        scheduler.check_integrity()
    return told


def preempt(engine: Engine, sequence: Sequence, costs: StepCoefficients) -> None:
    """Takes a running sequence's blocks, by swapping or recomputing as the costs say."""
    engine.scheduler._preemption._costs = StepCosts(costs)
    engine.scheduler._preemption.preempt(sequence, 0.0)


class DrawComparison:
    """Compares outputs of one request, and counts the near-ties among them."""

    def __init__(self, engine: Engine, reference: GreedyReference) -> None:
        """Compares outputs of an engine.

        Args:
            engine: Knows the languages.
            reference: Computes the logits that are disturbed.
        """
        self._engine = engine
        self.reference = reference
        self.num_tokens = 0
        self.near_ties: list[str] = []

    def add(
        self,
        prompt_ids: Seq[int],
        sampling: ResolvedSampling,
        expected: Seq[int],
        given: Seq[int],
    ) -> bool:
        """Compares two whole outputs of a request.

        Returns:
            Whether they are equal; False where they part at a near-tie.

        Raises:
            AssertionError: They differ where the draw is clear.
        """
        pairs = enumerate(zip(expected, given, strict=False))
        position = next((index for index, (one, other) in pairs if one != other), None)
        if position is None:
            assert len(given) == len(expected), (len(expected), len(given))
            self.num_tokens += len(expected)
            return True
        self.num_tokens += position + 1
        drawn = self._disturbed_draws(prompt_ids, sampling, expected[:position])
        where = f"output position {position}: {expected[position]} or {given[position]}"
        assert {expected[position], given[position]} <= drawn, f"{where}, near are {drawn}"
        self.near_ties.append(where)
        return False

    def check(self) -> None:
        """Asserts that near-ties were rare."""
        allowed = -(-self.num_tokens // TOKENS_PER_NEAR_TIE)
        assert len(self.near_ties) <= allowed, (self.num_tokens, self.near_ties)

    @torch.inference_mode()
    def _disturbed_draws(
        self, prompt_ids: Seq[int], sampling: ResolvedSampling, output_ids: Seq[int]
    ) -> set[int]:
        """What is drawn at a position from logits that are a little different each time."""
        served = self._engine.served
        # Where log-probabilities are told, tokens that must follow are drawn as well.
        telling = msgspec.structs.replace(sampling, num_logprobs=0)
        key = StreamKey(b"", 0)
        (sequence,) = served.sequences([key], prompt_ids, telling, output_ids=output_ids)
        if sequence.grammar is not None:
            sequence.grammar.compile()
            sequence.grammar.begin(output_ids)
        sequence.block_table = [0]
        running = RunningBatch(1)
        running.add(sequence)
        batch = running.build(0, [], [(sequence, sequence.num_tokens)], BlockTransfers())
        vocab_size = served.config.vocab_size
        sampler = Sampler(
            REFERENCE_SAMPLING,
            vocab_size=vocab_size,
            max_num_seqs=1,
            max_model_len=served.max_model_len,
            device=torch.device("cpu"),
        )
        logits = logits_of(self.reference, sequence.token_ids)[-1:]
        generator = torch.Generator().manual_seed(0)
        drawn = set()
        for _ in range(_NUM_DISTURBED):
            noise = torch.rand(1, vocab_size, generator=generator) * 2 - 1
            tokens = sampler.launch(
                logits + DISTURBANCE * noise,
                batch.sampling,
                lambda: served.fill_masks([sequence] if sequence.is_masked else []),
            )()
            drawn.add(int(tokens.token_ids[0, 0]))
        return drawn


@torch.inference_mode()
def logits_of(reference: GreedyReference, token_ids: Seq[int]) -> torch.Tensor:
    """[T, vocab_size] logits of `transformers` behind each token of a text."""
    logits: torch.Tensor = reference._model(torch.tensor([list(token_ids)])).logits[0].float()
    return logits


def check_logprobs(
    logits: torch.Tensor, token_ids: Seq[int], told: Seq[TokenLogprobs], num_top: int
) -> None:
    """Asserts that tokens have the log-probabilities and ranks that logits give them.

    Args:
        logits: [T, vocab_size] before each token.
        token_ids: [T] the tokens.
        told: [T] what was told of them.
        num_top: Likeliest tokens that were asked for.
    """
    assert len(told) == len(token_ids) == len(logits)
    expected = logits.double().log_softmax(-1).numpy()
    best = -np.sort(-expected, axis=-1)[:, :num_top]
    differences: list[float] = []
    for row, (token_id, each) in enumerate(zip(token_ids, told, strict=True)):
        scores = expected[row]
        differences.append(abs(each.logprob - scores[token_id]))
        num_above = (scores > scores[token_id] + LOGPROB_TOLERANCE).sum()
        num_near = (scores >= scores[token_id] - LOGPROB_TOLERANCE).sum()
        assert num_above < each.rank <= num_near
        ids = [top.token_id for top in each.top]
        top = np.array([top.logprob for top in each.top])
        assert len(set(ids)) == len(ids) == num_top
        differences += np.abs(top - best[row]).tolist()
        differences += np.abs(top - scores[ids]).tolist()
    assert max(differences, default=0.0) < LOGPROB_TOLERANCE
    assert sum(differences) <= MEAN_LOGPROB_TOLERANCE * len(differences)
