"""Bounds of the scheduler, and how many tokens a step may have."""

from __future__ import annotations

from dataclasses import dataclass

from mini_infer_engine.step_costs import StepCosts


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
    """How many prompt tokens a step may compute beside those that decode."""

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

    def prefill_tokens(self, num_decodes: int) -> int:
        """Prompt tokens of a step in which so many sequences decode."""
        budget = self._limits.max_num_batched_tokens - num_decodes
        target_ms = self._limits.target_itl_ms
        if target_ms is None or not num_decodes:
            return budget
        within = self._costs.prefill_tokens_within(target_ms / 1e3, num_decodes)
        return min(budget, max(within, self._block_size))
