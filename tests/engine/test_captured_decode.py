"""Recorded steps against the model run operation by operation."""

from __future__ import annotations

import pytest
import torch
from mini_infer.sampling_params import ResolvedSampling
from mini_infer_engine.build import Engine
from mini_infer_engine.captured_decode import CapturedDecode
from mini_infer_engine.input_buffers import ModelInputs
from mini_infer_engine.model_runner import ModelRunner
from mini_infer_engine.sequence import StreamKey


def generate(
    engine: Engine, runner: ModelRunner, num_rows: int, **options: float | bool
) -> tuple[list[list[int]], int]:
    """Output of some prompts of different lengths, and the number of steps it took."""
    scheduler = engine.scheduler
    fields = dict(temperature=0.0, top_k=0, top_p=1.0, max_tokens=45, ignore_eos=True)
    for row in range(num_rows):
        sampling = ResolvedSampling(seed=row, **{**fields, **options})  # type: ignore[arg-type]
        prompt = list(range(10 + row, 31 + 9 * row))
        scheduler.add(engine.served.sequence(StreamKey(b"", row), prompt, sampling))
    outputs: list[list[int]] = [[] for _ in range(num_rows)]
    before = scheduler.num_steps
    while not scheduler.is_idle:
        batch = scheduler.schedule(0.0)
        for update in scheduler.finish_step(batch, runner.run(batch), 0.0):
            outputs[update.key.stream] += update.token_ids
        scheduler.check_integrity()
    return outputs, scheduler.num_steps - before


def captured(engine: Engine) -> CapturedDecode:
    forward = engine.runner._forward
    assert isinstance(forward, CapturedDecode)
    return forward


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_recorded_logits_equal_the_models_own(engine: Engine, num_rows: int) -> None:
    replayed = captured(engine)
    compared = []

    def both(inputs: ModelInputs) -> torch.Tensor:
        first, again = replayed(inputs), replayed._forward(inputs)
        compared.append(torch.equal(first, again))
        return again

    generate(engine, ModelRunner(both, engine.runner.cache, engine.runner._buffers), num_rows)
    assert all(compared)
    assert len(compared) >= 45
