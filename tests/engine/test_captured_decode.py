"""Recorded and merged steps against the model run operation by operation."""

from __future__ import annotations

import pytest
import torch
from engine.runners import runner_of
from mini_infer.config import EngineConfig
from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer_engine.batch import RowStatus, StepTokens
from mini_infer_engine.build import Engine, build_engine
from mini_infer_engine.captured_decode import CAN_RECORD, CapturedDecode
from mini_infer_engine.input_buffers import ModelInputs
from mini_infer_engine.merged_decode import MERGED_ROUNDS
from mini_infer_engine.model_runner import EagerForward, ModelRunner
from mini_infer_engine.sequence import StreamKey

pytestmark = pytest.mark.skipif(not CAN_RECORD, reason="torch.jit ends with Python 3.13")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return build_engine(EngineConfig(kv_cache_tokens=4096), merge_decode_steps=True)


def generate(
    engine: Engine, runner: ModelRunner, num_rows: int, **options: float | bool
) -> tuple[list[list[int]], int]:
    """Output of some prompts of different lengths, and the number of steps it took."""
    prompts = [list(range(10 + row, 31 + 9 * row)) for row in range(num_rows)]
    return continue_prompts(engine, runner, prompts, **options)


def continue_prompts(
    engine: Engine, runner: ModelRunner, prompts: list[list[int]], **options: float | bool
) -> tuple[list[list[int]], int]:
    """Likewise of given prompts."""
    scheduler = engine.scheduler
    fields = dict(temperature=0.0, top_k=0, top_p=1.0, max_tokens=45, ignore_eos=True)
    for row, prompt in enumerate(prompts):
        sampling = ResolvedSampling(seed=row, **{**fields, **options})  # type: ignore[arg-type]
        scheduler.add(*engine.served.sequences([StreamKey(b"", row)], prompt, sampling), now=0.0)
    outputs: list[list[int]] = [[] for _ in prompts]
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

    generate(engine, runner_of(engine, both), num_rows)
    assert all(compared)
    assert len(compared) >= 45


@pytest.mark.parametrize(
    ("prompt_lens", "num_groups"),
    [([300, 20, 40, 20], 2), ([900, 20, 250, 40, 20, 250], 3), ([9, 600, 20, 9, 200, 610, 30], 3)],
)
def test_recorded_groups_give_the_logits_of_each_row_alone(
    engine: Engine, prompt_lens: list[int], num_groups: int
) -> None:
    """Whatever order and sizes the groups have: recorded, eager, and one row a step."""
    replayed = captured(engine)
    kept: list[torch.Tensor] = []
    seen = set()

    def both(inputs: ModelInputs) -> torch.Tensor:
        logits = replayed(inputs)
        assert torch.equal(logits, replayed._forward(inputs))
        kept.append(logits.clone())
        seen.add(len(inputs.attention.decode_groups))
        return logits

    runner = runner_of(engine, both)
    prompts = [[10 + row] * 3 + list(range(3, length)) for row, length in enumerate(prompt_lens)]
    outputs, _ = continue_prompts(engine, runner, prompts, max_tokens=6)
    together = torch.stack(kept[-5:], 1)
    assert num_groups in seen
    for row, prompt in enumerate(prompts):
        kept.clear()
        assert continue_prompts(engine, runner, [prompt], max_tokens=6)[0] == [outputs[row]]
        torch.testing.assert_close(together[row], torch.cat(kept[-5:]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("max_tokens", [1, 2, 45])
def test_merged_steps_make_the_same_tokens(engine: Engine, max_tokens: int) -> None:
    eager = runner_of(engine)
    expected, num_steps = generate(engine, eager, 1, max_tokens=max_tokens)
    got, num_merged_steps = generate(engine, engine.runner, 1, max_tokens=max_tokens)
    assert got == expected
    assert len(got[0]) == max_tokens
    if max_tokens == 45:
        assert num_merged_steps < 2 * num_steps / MERGED_ROUNDS


@pytest.mark.parametrize("options", [dict(temperature=0.8), dict(min_tokens=45, ignore_eos=False)])
def test_rows_that_draw_or_ban_are_not_merged(engine: Engine, options: dict[str, float]) -> None:
    _, num_steps = generate(engine, engine.runner, 1, **options)
    assert num_steps == 45


def test_a_row_that_is_not_finite_in_a_merged_step_fails(engine: Engine) -> None:
    scheduler, runner = engine.scheduler, engine.runner
    sampling = ResolvedSampling(temperature=0.0, top_k=0, top_p=1.0, seed=0, max_tokens=40)
    scheduler.add(*engine.served.sequences([StreamKey(b"", 0)], [9] * 16, sampling), now=0.0)
    batch = scheduler.schedule(0.0)
    scheduler.finish_step(batch, runner.run(batch), 0.0)
    runner.cache.fill(batch.block_tables[0].tolist(), float("nan"))
    batch = scheduler.schedule(0.0)
    tokens: StepTokens = runner.run(batch)
    assert len(tokens.token_ids[0]) == MERGED_ROUNDS
    assert tokens.statuses == [RowStatus.NON_FINITE]
    (update,) = scheduler.finish_step(batch, tokens, 0.0)
    assert update.error is not None
    generate(engine, runner, 1)


def test_merged_steps_reach_the_end_of_the_context() -> None:
    """Rounds behind the end have positions as well, where it is not the end of a block."""
    short = build_engine(
        EngineConfig(max_model_len=66, kv_cache_tokens=256), merge_decode_steps=True
    )
    (output,), _ = generate(short, short.runner, 1)
    assert len(output) == 45


def test_a_chunk_of_one_prompt_token_makes_no_token() -> None:
    """A step whose row is not complete is not taken for decoding."""
    config = EngineConfig(max_num_seqs=1, max_num_batched_tokens=1, kv_cache_tokens=256)
    slow = build_engine(config)
    outputs, num_steps = generate(slow, slow.runner, 1, max_tokens=9)
    expected, _ = generate(slow, runner_of(slow, captured(slow)), 1, max_tokens=9)
    assert outputs == expected
    assert num_steps <= 21 + 9


def test_steps_are_merged_only_where_it_was_asked_for() -> None:
    plain = build_engine(EngineConfig(kv_cache_tokens=256))
    _, num_steps = generate(plain, plain.runner, 1)
    assert num_steps == 45


def test_where_recording_fails_steps_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("no recordings here")

    monkeypatch.setattr(torch.jit, "trace", fail)
    eager = build_engine(EngineConfig(kv_cache_tokens=256), merge_decode_steps=True)
    assert isinstance(eager.runner._forward, EagerForward)
    outputs, num_steps = generate(eager, eager.runner, 1)
    assert len(outputs[0]) == num_steps == 45
