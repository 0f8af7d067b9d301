"""How long steps take, learnt from the steps themselves, and how often sequences end.

The scheduler asks `StepCosts` how many prompt tokens fit into a step, when a waiting request could
have its first token, and which kind of preemption costs less. It asks `CompletionRate` when running
sequences leave their places. Neither reads a clock or knows a sequence.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt

# A step whose seconds differ from the prediction by more than this factor is a surprise. A rare one
# is a stall, and counts for no more than this.
_SURPRISE_FACTOR = 2.0

# The share of surprises is taken over about sixteen steps. Above a half (eleven in a row) it is the
# machine that has changed.
_SURPRISE_WEIGHT = 1 / 16
_MAX_SURPRISE_SHARE = 0.5

# Variance (relative to the prior) of each coefficient before any step: a factor of two is likely.
_PRIOR_VARIANCE = 4.0

# A kind of step is known as well as from fifty of them at most. The four terms can have fifty each:
# about the last two hundred steps count.
_LEAST_VARIANCE = 1 / 50

# A term never costs less than this share of its prior: times stay positive, quotients finite.
_LEAST_FACTOR = 1e-3

_COMPLETIONS_KEPT = 1 - 1 / 64


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCoefficients:
    """What the parts of a step cost.

    Attributes:
        step_s: Seconds of a step without anything in it.
        row_s: Seconds for each sequence that decodes.
        token_s: Seconds for each prompt token.
        block_s: Seconds for each block that is copied between device and host, either way.
    """

    step_s: float
    row_s: float
    token_s: float
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

        seconds = step_s + row_s * decodes + token_s * prefill_tokens + block_s * swapped_blocks

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
    """

    def __init__(self, prior: StepCoefficients) -> None:
        """Starts from a guess.

        Args:
            prior: What a trial measured, or a rough estimate: within a factor of ten is enough.
        """
        self._prior = np.array(astuple(prior))
        self._factors = np.ones(4)
        self._covariance = np.eye(4) * _PRIOR_VARIANCE
        self._surprise_share = 0.0
        self._coefficients: list[float] = self._prior.tolist()

    @property
    def coefficients(self) -> StepCoefficients:
        """What the parts of a step cost by now."""
        step_s, row_s, token_s, block_s = self._coefficients
        return StepCoefficients(step_s=step_s, row_s=row_s, token_s=token_s, block_s=block_s)

    def seconds(
        self, num_decodes: int, num_prefill_tokens: int, num_swapped_blocks: int = 0
    ) -> float:
        """Predicts how long a step takes.

        Args:
            num_decodes: Sequences that decode.
            num_prefill_tokens: Prompt tokens that are computed.
            num_swapped_blocks: Blocks copied between device and host, out and in together.
        """
        step_s, row_s, token_s, block_s = self._coefficients
        compute_s = step_s + row_s * num_decodes + token_s * num_prefill_tokens
        return compute_s + block_s * num_swapped_blocks

    def prefill_tokens_within(self, seconds: float, num_decodes: int) -> int:
        """Most prompt tokens beside so many decodes with which a step takes at most `seconds`.

        Args:
            seconds: Finite.
            num_decodes: Sequences that decode. Where they alone take longer, 0 is returned.
        """
        left = seconds - self.seconds(num_decodes, 0)
        return max(0, math.floor(left / self._coefficients[2]))

    def prefill_seconds(self, num_tokens: int, tokens_per_step: int, num_decodes: int) -> float:
        """Predicts how long a prompt takes in steps that also decode.

            ceil(num_tokens / tokens_per_step) * seconds(num_decodes, 0) + token_s * num_tokens

        Args:
            num_tokens: Prompt tokens.
            tokens_per_step: Prompt tokens in a step at most, at least 1.
            num_decodes: Sequences that decode beside them in each step.
        """
        num_steps = -(-num_tokens // tokens_per_step)
        return num_steps * self.seconds(num_decodes, 0) + self.recompute_seconds(num_tokens)

    def recompute_seconds(self, num_tokens: int) -> float:
        """What steps take longer if they compute these tokens again: token_s * num_tokens."""
        return self._coefficients[2] * num_tokens

    def swap_seconds(self, num_blocks: int) -> float:
        """What steps take longer if they copy these blocks out and in: 2 * block_s * num_blocks."""
        return 2 * self._coefficients[3] * num_blocks

    def note(
        self, *, num_decodes: int, num_prefill_tokens: int, num_swapped_blocks: int, seconds: float
    ) -> None:
        """Learns from a step that has run.

        Args:
            num_decodes: Sequences that decoded.
            num_prefill_tokens: Prompt tokens that were computed.
            num_swapped_blocks: Blocks copied between device and host, out and in together.
            seconds: How long it took. Ignored unless positive and finite.
        """
        if not 0 < seconds < math.inf:
            return
        predicted = self.seconds(num_decodes, num_prefill_tokens, num_swapped_blocks)
        seconds = self._without_surprise(seconds, predicted)
        terms = self._prior * (1, num_decodes, num_prefill_tokens, num_swapped_blocks)
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
        self._covariance = np.eye(4) * _PRIOR_VARIANCE
        return seconds

    def _fit(self, shares: npt.NDArray[np.float64], ratio: float) -> None:
        """Updates factors and covariance with a step.

        Args:
            shares: [4] share of each term in the step's seconds by the prior.
            ratio: The step's seconds / its seconds by the prior.
        """
        gain = self._covariance @ shares
        variance = float(shares @ gain)
        error = ratio - float(self._factors @ shares)
        self._factors += gain * (error / (1 + variance))
        if variance > _LEAST_VARIANCE:
            self._covariance -= np.outer(gain, gain) / (1 + variance)
        np.maximum(self._factors, _LEAST_FACTOR, out=self._factors)
        self._coefficients = (self._factors * self._prior).tolist()


class CompletionRate:
    """How often a running sequence ends while others wait for its place.

    The mean of the seconds between completions, where older ones fade (derived here). With k =
    `_COMPLETIONS_KEPT` and the intervals numbered from the newest,

        mean = sum of k^i * interval_i / sum of k^i

    An interval counts if sequences waited at both of its ends, so idle time never does: before an
    engine is idle, a sequence ends while none waits. Those that end together are 0 seconds apart.
    """

    def __init__(self) -> None:
        """Knows nothing yet."""
        self._last_saturated: float | None = None
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
        self._last_saturated = now if saturated else None

    def seconds_until(self, num_completions: int) -> float:
        """Predicts when so many running sequences have ended: seconds from now.

        Returns:
            0.0 while nothing is known.
        """
        return num_completions * self._sum_s / self._weight if self._weight else 0.0
