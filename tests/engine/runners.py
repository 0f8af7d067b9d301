"""Runners over an engine's own parts, with some of them replaced."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from mini_infer_engine.batch import (
    FillMasks,
    LaunchedTokens,
    ScheduledBatch,
    StepTokens,
    fill_no_masks,
)
from mini_infer_engine.build import Engine
from mini_infer_engine.kv_cache import KVCache
from mini_infer_engine.model_runner import EagerForward, Forward, ModelRunner


def runner_of(
    engine: Engine, forward: Forward | None = None, cache: KVCache | None = None
) -> ModelRunner:
    """Runs an engine's model, operation by operation where no other way is given."""
    runner = engine.runner
    return ModelRunner(
        engine.model,
        forward or EagerForward(engine.model),
        cache or runner.cache,
        runner._buffers,
        runner._sampler,
    )


class AheadRunner:
    """A runner on a CPU whose steps may be launched ahead, as a GPU's may.

    A step is computed when its tokens are asked for. Those before it are known by then, and stand
    in for the unknown ones that it was written down with.
    """

    runs_ahead = True

    def __init__(self, runner: ModelRunner) -> None:
        self.cache = runner.cache
        self.num_ahead = 0
        self._runner = runner
        self._last_ids = np.empty(0, np.int64)

    def launch(
        self, batch: ScheduledBatch, fill_masks: FillMasks = fill_no_masks
    ) -> LaunchedTokens:
        return partial(self._run, batch, fill_masks)

    def _run(self, batch: ScheduledBatch, fill_masks: FillMasks) -> StepTokens:
        token_ids = batch.token_ids.copy()
        unknown = np.flatnonzero(token_ids < 0)
        self.num_ahead += bool(len(unknown))
        token_ids[unknown] = self._last_ids[-1 - token_ids[unknown]]
        tokens = self._runner.run(replace(batch, token_ids=token_ids), fill_masks)
        self._last_ids = tokens.token_ids[:, -1]
        return tokens
