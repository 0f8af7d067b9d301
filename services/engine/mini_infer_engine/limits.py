"""Bounds of the scheduler, and how many tokens a step may have."""

from __future__ import annotations

from dataclasses import dataclass

from mini_infer_engine.step_costs import StepCosts, StepWork

# Share of the target that a step may take by prediction: some steps take a little longer, and the
# tokens are still to be delivered.
_AIM = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Bounds of the scheduler, as `EngineConfig` names them and explains them."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_queued_requests: int
    max_queued_tokens: int | None = None
    target_itl_ms: float | None = None
    priority_ageing_s: float = 30.0
    kv_watermark: float = 0.0


class StepBudget:
    """How many prompt tokens a step may compute beside what it does already."""

    def __init__(self, limits: SchedulerLimits, costs: StepCosts, block_size: int) -> None:
        """Takes what it depends on.

        Args:
            limits: `max_num_batched_tokens` bounds every step, `target_itl_ms` those with streams.
            costs: What steps take.
            block_size: Prompt tokens that a step may have in any case: prompts must get done.
        """
        self._limits = limits
        self._costs = costs
        self._block_size = block_size

    def prefill_tokens(self, work: StepWork, num_context_tokens: float = 0) -> int:
        """Tokens that one more prompt may have in a step; 0 where the step is full.

        Args:
            work: What the step does already.
            num_context_tokens: Tokens of the prompt that are in the cache before.
        """
        left = self._limits.max_num_batched_tokens - work.num_decodes - work.num_prefill_tokens
        target_ms = self._limits.target_itl_ms
        if target_ms is None or not work.num_decodes:
            return left
        aim_s = _AIM * target_ms / 1e3
        within = self._costs.prefill_tokens_within(aim_s, work, num_context_tokens)
        return min(left, max(within, self._block_size - work.num_prefill_tokens))
