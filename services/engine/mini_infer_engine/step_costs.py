"""How long steps take, learnt from the steps themselves, and how often sequences end.

The scheduler describes work (`StepWork`) and asks `StepCosts` how many prompt tokens fit into a
step beside it, when a waiting request could have its first token, and which kind of preemption
costs less. It asks `CompletionRate` when running sequences leave their places. None of them reads a
clock or knows a sequence.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from operator import mul
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# A step whose seconds differ from the prediction by more than this factor is a surprise. A rare one
# is a stall, and counts for no more than this.
_SURPRISE_FACTOR = 2.0

# The share of surprises is taken over about sixteen steps. Above a half (eleven in a row) it is the
# machine that has changed.
_SURPRISE_WEIGHT = 1 / 16
_MAX_SURPRISE_SHARE = 0.5

# Variance (relative to the prior) of each coefficient before any step: a factor of four is likely.
_PRIOR_VARIANCE = 16.0

# A kind of step is known as well as from fifty of them at most. The six terms can have fifty each:
# about the last three hundred steps count.
_LEAST_VARIANCE = 1 / 50

# A term never costs less than this share of its prior: times stay positive, quotients finite.
_LEAST_FACTOR = 1e-3

_COMPLETIONS_KEPT = 1 - 1 / 64
_COMPLETIONS_VALID_S = 10.0


class StepWork(NamedTuple):
    """What a step does, in the order of `StepCoefficients`.

    Attributes:
        num_decodes: Sequences that decode.
        num_context_tokens: Tokens that those have in the cache, all together.
        num_prefill_tokens: Prompt tokens that are computed.
        num_pairs: Pairs of such a token and one that it attends to; a mean where prompts are not
            known one by one.
        num_swapped_blocks: Blocks copied between device and host, out and in together.
    """

    num_decodes: int = 0
    num_context_tokens: int = 0
    num_prefill_tokens: int = 0
    num_pairs: float = 0.0
    num_swapped_blocks: int = 0

    def with_row(self, num_context_tokens: int) -> StepWork:
        """The same and one more sequence that decodes, with so many tokens in the cache."""
        return self._replace(
            num_decodes=self.num_decodes + 1,
            num_context_tokens=self.num_context_tokens + num_context_tokens,
        )

    def with_chunk(self, num_tokens: int, num_context_tokens: int) -> StepWork:
        """The same and one more part of a prompt.

        Its first token attends to those before it, its last one to nearly all of the part too:

            num_tokens * (num_context_tokens + num_tokens / 2) pairs

        Args:
            num_tokens: Tokens of the part.
            num_context_tokens: Tokens of the prompt that are in the cache before.
        """
        return self._replace(
            num_prefill_tokens=self.num_prefill_tokens + num_tokens,
            num_pairs=self.num_pairs + num_tokens * (num_context_tokens + num_tokens / 2),
        )


NO_WORK = StepWork()
"""A step without anything in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCoefficients:
    """What the parts of a step cost.

    Attributes:
        step_s: Seconds of a step without anything in it.
        row_s: Seconds for each sequence that decodes.
        context_s: Seconds for each token that such a sequence has in the cache.
        token_s: Seconds for each prompt token.
        pair_s: Seconds for each prompt token and each token that it attends to.
        block_s: Seconds for each block that is copied between device and host, either way.
    """

    step_s: float
    row_s: float
    context_s: float
    token_s: float
    pair_s: float
    block_s: float

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: Where one is not a positive finite number.
        """
        if not all(0 < value < math.inf for value in astuple(self)):
            raise ValueError(f"expected positive finite seconds, got {self}")


class StepCosts:
    """Predicts the seconds of a step.

    The model, with coefficients that are never negative:

        seconds = step_s + row_s * decodes + context_s * context_tokens
            + token_s * prefill_tokens + pair_s * pairs + block_s * swapped_blocks

    Its fit is recursive least squares in the units of the prior (derived here). With p = the
    seconds by the prior, z_i = the share of term i in p, and f_i = coefficient i / its prior,

        seconds / p = sum of f_i * z_i,   every f_i = 1 at first

    so each step weighs the same, however long it took. With P the covariance of f, a step with the
    error e = seconds / p - f . z changes

        v = P z,   q = z . v,   f += v * e / (1 + q),
        P -= v v^T / (1 + q) if q > `_LEAST_VARIANCE`

    Without the condition all steps ever seen would weigh the same. With it, q stays near that limit
    for the steps that come, and each new one makes the older ones fade by 1 / (1 + q), but only in
    the direction z. P never grows, so nothing blows up when all steps are alike, and what recent
    steps do not tell apart keeps its former value.

    Where that makes f_i too small, the most likely f with f_i = b, the bound, takes its place:

        f += P_i * (b - f_i) / P_ii,   P_i the column i of P

    Without it, what is known of a sum of terms would be lost whenever one of them is cut off.
    """

    def __init__(self, prior: StepCoefficients) -> None:
        """Starts from a guess.

        Args:
            prior: What a trial measured, or a rough estimate: within a factor of ten is enough.
        """
        self._first_guess = prior
        self._prior = np.array(astuple(prior))
        self._factors = np.ones(len(self._prior))
        self._covariance = np.eye(len(self._prior)) * _PRIOR_VARIANCE
        self._surprise_share = 0.0
        self._coefficients: list[float] = self._prior.tolist()

    @property
    def coefficients(self) -> StepCoefficients:
        """What the parts of a step cost by now."""
        step_s, row_s, context_s, token_s, pair_s, block_s = self._coefficients
        return StepCoefficients(
            step_s=step_s,
            row_s=row_s,
            context_s=context_s,
            token_s=token_s,
            pair_s=pair_s,
            block_s=block_s,
        )

    def untaught(self) -> StepCosts:
        """The same without anything that was learnt."""
        return StepCosts(self._first_guess)

    def seconds(self, work: StepWork) -> float:
        """Predicts how long a step takes that does this work."""
        seconds: float = sum(map(mul, self._coefficients, (1, *work)))
        return seconds

    def added_seconds(self, work: StepWork) -> float:
        """Predicts how much longer steps take that do this work beside their own."""
        return self.seconds(work) - self._coefficients[0]

    def prefill_tokens_within(
        self, seconds: float, work: StepWork, num_context_tokens: float
    ) -> int:
        """Most tokens of one more prompt with which a step takes at most `seconds`.

        The largest n with (derived here)

            (token_s + pair_s * num_context_tokens) * n + pair_s / 2 * n^2 <= what is left

        Args:
            seconds: Finite.
            work: What the step does beside. Where it alone takes longer, 0 is returned.
            num_context_tokens: Tokens of the prompt that are in the cache before.
        """
        left = seconds - self.seconds(work)
        if left <= 0:
            return 0
        _, _, _, token_s, pair_s, _ = self._coefficients
        first_s = token_s + pair_s * num_context_tokens
        return math.floor(2 * left / (first_s + math.sqrt(first_s**2 + 2 * pair_s * left)))

    def prefill_seconds(self, prompts: StepWork, tokens_per_step: int, beside: StepWork) -> float:
        """Predicts how long prompts take in steps that also decode.

            ceil(tokens of the prompts / tokens_per_step) * seconds(beside) + added_seconds(prompts)

        Args:
            prompts: What there is to do for them, in all steps together.
            tokens_per_step: Prompt tokens in a step at most, at least 1.
            beside: What each step does beside them.
        """
        num_steps = -(-prompts.num_prefill_tokens // tokens_per_step)
        return num_steps * self.seconds(beside) + self.added_seconds(prompts)

    def note(self, *, work: StepWork, seconds: float) -> None:
        """Learns from a step that has run.

        Args:
            work: What it did.
            seconds: How long it took. Ignored unless positive and finite.
        """
        if not 0 < seconds < math.inf:
            return
        seconds = self._without_surprise(seconds, self.seconds(work))
        terms = self._prior * (1, *work)
        by_prior = terms.sum()
        self._fit(terms / by_prior, seconds / by_prior)

    def _without_surprise(self, seconds: float, predicted: float) -> float:
        """The seconds of a step to learn from: at most a few times what was predicted.

        Where surprises are the rule, the factors become as uncertain as at first: the next steps
        set them anew.
        """
        least, most = predicted / _SURPRISE_FACTOR, predicted * _SURPRISE_FACTOR
        is_surprise = not least <= seconds <= most
        self._surprise_share += (is_surprise - self._surprise_share) * _SURPRISE_WEIGHT
        if self._surprise_share <= _MAX_SURPRISE_SHARE:
            return min(seconds, most)
        self._surprise_share = 0.0
        self._covariance = np.eye(len(self._prior)) * _PRIOR_VARIANCE
        return seconds

    def _fit(self, shares: npt.NDArray[np.float64], ratio: float) -> None:
        """Updates factors and covariance with a step.

        Args:
            shares: [6] share of each term in the step's seconds by the prior.
            ratio: The step's seconds / its seconds by the prior.
        """
        gain = self._covariance @ shares
        variance = float(shares @ gain)
        error = ratio - float(self._factors @ shares)
        self._factors += gain * (error / (1 + variance))
        if variance > _LEAST_VARIANCE:
            self._covariance -= np.outer(gain, gain) / (1 + variance)
        self._keep_positive()
        self._coefficients = (self._factors * self._prior).tolist()

    def _keep_positive(self) -> None:
        """Moves factors that are too small to the bound, and the others along with them."""
        for _ in range(len(self._factors)):  # one that is moved may take another below the bound
            index = int(self._factors.argmin())
            missing = _LEAST_FACTOR - float(self._factors[index])
            if missing <= 0:
                return
            column = self._covariance[:, index]
            self._factors += column * (missing / column[index])
        np.maximum(self._factors, _LEAST_FACTOR, out=self._factors)


class CompletionRate:
    """How often a running sequence ends while others wait for its place.

    The mean of the seconds between completions, where older ones fade (derived here). With k =
    `_COMPLETIONS_KEPT` and the intervals numbered from the newest,

        mean = sum of k^i * interval_i / sum of k^i

    An interval counts if sequences waited at both of its ends, so idle time never does: before an
    engine is idle, a sequence ends while none waits. Those that end together are 0 seconds apart.
    What is older than `_COMPLETIONS_VALID_S` says nothing any more: refusals that rest on it would
    keep newer ones from coming.
    """

    def __init__(self) -> None:
        """Knows nothing yet."""
        self._last_saturated: float | None = None
        self._learnt_at = 0.0
        self._sum_s = 0.0
        self._weight = 0.0

    def note_completion(self, now: float, saturated: bool) -> None:
        """A sequence has ended.

        Args:
            now: Monotonic seconds.
            saturated: Whether others wait to run.
        """
        if saturated and self._last_saturated is not None:
            self._sum_s = _COMPLETIONS_KEPT * self._sum_s + now - self._last_saturated
            self._weight = _COMPLETIONS_KEPT * self._weight + 1
            self._learnt_at = now
        self._last_saturated = now if saturated else None

    def seconds_until(self, num_completions: int, now: float) -> float:
        """Predicts when so many running sequences have ended: seconds from now.

        Returns:
            0.0 while nothing is known.
        """
        if not self._weight or now - self._learnt_at > _COMPLETIONS_VALID_S:
            return 0.0
        return num_completions * self._sum_s / self._weight
