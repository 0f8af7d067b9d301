"""Runners over an engine's own parts, with some of them replaced."""

from __future__ import annotations

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
