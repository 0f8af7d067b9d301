"""Decoding steps as CUDA graphs: the same tokens, nothing compiled, nothing allocated.

`make test-gpu`.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mini_infer import (
    EngineConfig,
    GenerationOutput,
    LLMEngine,
    RepetitionDetection,
    SamplingParams,
    StructuredOutput,
)
from mini_infer.logprobs import MAX_LOGPROBS
from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer_engine.build import Engine
from mini_infer_engine.pipeline import FinishedBatch, StepPipeline
from mini_infer_engine.sequence import StreamKey

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(300),  # kernels are compiled
]

MAX_NUM_SEQS = 6
PROMPTS = [f"Once upon a time{' there was a' * (index % 5)}" for index in range(20)]
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
DRAWN: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "top_p": 0.9}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "is_brave": {"type": "boolean"}},
    "required": ["name", "is_brave"],
    "additionalProperties": False,
}
MIX: list[dict[str, Any]] = [
    GREEDY,
    DRAWN,
    {"top_p": 0.7, "stop": ["e"]},
    {"min_p": 0.1, "n": 2},
    {"typical_p": 0.6, "max_tokens": 11},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2, "top_k": 50},
    {"logit_bias": {500: 2.0, 700: -50.0}, "bad_words": ["the", "there was a"]},
    {"allowed_token_ids": list(range(200, 2000))},
    {"structured_output": StructuredOutput(json_schema=SCHEMA)},
    {"structured_output": StructuredOutput(regex="[a-z]{20}"), "temperature": 0.0, "logprobs": 2},
    {"repetition_detection": RepetitionDetection(max_period=4, num_repeats=3)},
    {"logprobs": 20, "prompt_logprobs": 3},
    {"temperature": 0.0, "logprobs": 0, "min_tokens": 40},
    {"temperature": 0.0},
]
COUNT_COMPILATIONS = """
import json, random, sys
from triton import knobs

compiled = []
knobs.runtime.jit_post_compile_hook = lambda *, repr, **_: compiled.append(repr)

from mini_infer import EngineConfig, LLMEngine, SamplingParams

dtype, *requests = json.loads(sys.argv[1])
config = EngineConfig(
    device="cuda", dtype=dtype, max_num_seqs=12, kv_cache_tokens=2**14, swap_space_gib=0
)
generator = random.Random(0)
with LLMEngine(config) as engine:
    assert compiled, "the hook is not called"
    compiled.clear()
    batches = [[length] for length in range(1, 41)]
    batches += [[2 * index + 1 for index in range(size)] for size in range(2, 20)]
    for number, lengths in enumerate(batches):
        prompts = [[generator.randrange(10, 4096) for _ in range(each)] for each in lengths]
        params = SamplingParams(max_tokens=4, **requests[number % len(requests)])
        engine.generate(prompts, params)
print(json.dumps(compiled))
"""
"""In a process of its own: what another test has compiled is compiled for the whole process."""


def config_of(**fields: Any) -> EngineConfig:
    """Few rows and tokens a step, so that requests wait for each other and prompts are cut up."""
    defaults: dict[str, Any] = {
        "device": "cuda",
        "dtype": "float32",
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_batched_tokens": 64,
        "kv_cache_tokens": 2**15,
        "enable_prefix_caching": False,  # the second run of a test is to be like the first
        "swap_space_gib": 0,
    }
    return EngineConfig(**defaults | fields)


@pytest.fixture(scope="module")
def graphed() -> Iterator[LLMEngine]:
    with LLMEngine(config_of()) as made:
        yield made


@pytest.fixture(scope="module")
def eager() -> Iterator[LLMEngine]:
    with LLMEngine(config_of(enforce_eager=True)) as made:
        yield made


@pytest.fixture
def count_replays(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Replays of graphs since the last look."""
    num_replays = 0
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        nonlocal num_replays
        num_replays += 1
        replay(graph)

    def look() -> int:
        nonlocal num_replays
        counted_so_far, num_replays = num_replays, 0
        return counted_so_far

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return look


def mixed_params(max_tokens: int = 48, seed: int = 7) -> list[SamplingParams]:
    defaults = {"max_tokens": max_tokens, "temperature": 0.9, "seed": seed}
    return [SamplingParams(**defaults | options) for options in MIX]


def assert_same(outputs: Sequence[GenerationOutput], expected: Sequence[GenerationOutput]) -> None:
    """Sums in another order can turn a near tie, of which there is hardly one in 1,000 tokens."""
    pairs = list(zip(outputs, expected, strict=True))
    same = [(one, other) for one, other in pairs if one.token_ids == other.token_ids]
    assert len(pairs) - len(same) <= 1
    for output, reference in same:
        assert output.finish_reason == reference.finish_reason != "error"
        assert output.text == reference.text
        for told, own in (
            (output.logprobs, reference.logprobs),
            (output.prompt_logprobs, reference.prompt_logprobs),
        ):
            assert [each.rank for each in told] == [each.rank for each in own]
            assert [each.logprob for each in told] == pytest.approx(
                [each.logprob for each in own], abs=1e-3
            )


# --- the same tokens ----------------------------------------------------------------------------


def test_greedy_ids_equal_those_without_graphs_and_those_on_the_cpu(
    graphed: LLMEngine, eager: LLMEngine, count_replays: Callable[[], int]
) -> None:
    params = [
        SamplingParams(**GREEDY, max_tokens=24 + 3 * (index % 7)) for index in range(len(PROMPTS))
    ]
    outputs = graphed.generate(PROMPTS, params)
    # The layers and the choice of each step that decodes alone.
    assert count_replays() > 2 * max(each.max_tokens or 0 for each in params)
    assert_same(outputs, eager.generate(PROMPTS, params))
    assert count_replays() == 0
    with LLMEngine(EngineConfig(device="cpu")) as on_cpu:
        assert_same(outputs, on_cpu.generate(PROMPTS, params))


def test_requests_of_all_kinds_in_one_batch(graphed: LLMEngine, eager: LLMEngine) -> None:
    params = mixed_params()
    prompts = PROMPTS[: len(params)]
    assert len(prompts) > 2 * MAX_NUM_SEQS
    assert_same(graphed.generate(prompts, params), eager.generate(prompts, params))


@pytest.mark.parametrize("options", MIX, ids=lambda options: "-".join(options))
def test_requests_of_one_kind(
    graphed: LLMEngine, eager: LLMEngine, options: dict[str, Any]
) -> None:
    params = SamplingParams(**{"max_tokens": 48, "temperature": 0.9, "seed": 3} | options)
    assert_same(graphed.generate(PROMPTS[:8], params), eager.generate(PROMPTS[:8], params))


def test_a_graph_serves_every_length(graphed: LLMEngine, eager: LLMEngine) -> None:
    """Graphs are captured before there is any context."""
    generator = random.Random(1)
    lengths = [3000, 3001, 2999, 7, 1500, 3015]
    prompts = [[generator.randrange(10, 4096) for _ in range(length)] for length in lengths]
    params = SamplingParams(**GREEDY, max_tokens=40)
    assert_same(graphed.generate(prompts, params), eager.generate(prompts, params))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(**GREEDY, max_tokens=40),
        SamplingParams(**DRAWN, max_tokens=40, seed=2, n=2),
        SamplingParams(temperature=0.8, max_tokens=40, seed=2, stop=["e"], min_tokens=3),
        mixed_params(),
    ],
    ids=["greedy", "drawn", "ends that come as a surprise", "mixed"],
)
def test_outputs_equal_those_of_one_step_after_the_other(
    graphed: LLMEngine,
    monkeypatch: pytest.MonkeyPatch,
    params: SamplingParams | list[SamplingParams],
) -> None:
    prompts = PROMPTS[: len(params)] if isinstance(params, list) else PROMPTS
    outputs = graphed.generate(prompts, params)
    monkeypatch.setattr(graphed._engine.runner, "runs_ahead", False)
    assert_same(outputs, graphed.generate(prompts, params))


@pytest.mark.parametrize("options", [GREEDY, DRAWN | {"ignore_eos": True, "seed": 1}])
def test_every_step_behind_the_prompts_is_launched_ahead(
    graphed: LLMEngine, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    scheduler = graphed._engine.scheduler
    schedule_ahead = scheduler.schedule_ahead
    num_ahead = 0

    def counted(*arguments: Any) -> Any:
        nonlocal num_ahead
        batch = schedule_ahead(*arguments)
        num_ahead += batch is not None
        return batch

    monkeypatch.setattr(scheduler, "schedule_ahead", counted)
    before = graphed.num_steps
    graphed.generate(PROMPTS[:4], SamplingParams(**options, max_tokens=32))
    assert num_ahead == 31
    assert graphed.num_steps - before == 32


# --- nothing but replays ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "requests",
    [
        [{"temperature": 0.0}, {"temperature": 0.8, "top_k": 40, "top_p": 0.9}],
        [
            {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
            {"temperature": 0.7, "bad_words": ["the"]},
            {"temperature": 0.7, "bad_words": ["the", "there was a"], "min_tokens": 2},
            {"temperature": 0.7, "allowed_token_ids": [200, 300]},
        ],
        [{"temperature": 0.0, "logprobs": num_top} for num_top in (0, 1, 2, 16, MAX_LOGPROBS)],
        [{"temperature": 0.0, "prompt_logprobs": num_top} for num_top in (0, 1, 3)],
    ],
    ids=["plain", "changed logits", "logprobs", "prompt logprobs"],
)
def test_nothing_is_compiled_after_the_engine_is_built(
    requests: list[dict[str, Any]], dtype: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT_COMPILATIONS, json.dumps([dtype, *requests])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


class Decoding:
    """Sequences of an engine that all decode, step by step."""

    def __init__(self, engine: Engine, num_rows: int, options: dict[str, Any]) -> None:
        sampling = ResolvedSampling(
            **{"top_k": 0, "top_p": 1.0, "seed": 0} | options, max_tokens=1000
        )
        self._engine = engine
        self._num_rows = num_rows
        self._pipeline = StepPipeline(engine.scheduler, engine.runner, engine.served.fill_masks)
        # Streams that `LLMEngine` does not come to.
        self._keys = [StreamKey(b"", 10**6 + row) for row in range(num_rows)]
        for row, key in enumerate(self._keys):
            prompt = list(range(10, 15 + 9 * row))
            (sequence,) = engine.served.sequences([key], prompt, sampling)
            engine.scheduler.add(sequence, now=time.monotonic())
        while self.step().batch.num_decodes < num_rows:
            pass

    def step(self) -> FinishedBatch:
        return self._pipeline.finish(self._pipeline.launch())

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            batch = self.step().batch
            assert batch.num_decodes == len(batch.keys) == self._num_rows

    def close(self) -> None:
        for key in self._keys:
            self._engine.scheduler.abort(key, time.monotonic())
        while not self._pipeline.is_idle:
            self.step()


@contextmanager
def decoding(engine: Engine, num_rows: int, options: dict[str, Any]) -> Iterator[Decoding]:
    rows = Decoding(engine, num_rows, options)
    try:
        yield rows
    finally:
        rows.close()


@pytest.mark.parametrize("num_rows", [1, 5, MAX_NUM_SEQS])
@pytest.mark.parametrize("options", [GREEDY, DRAWN | {"ignore_eos": True}], ids=["greedy", "drawn"])
def test_a_step_allocates_nothing_on_the_device(
    graphed: LLMEngine, num_rows: int, options: dict[str, Any]
) -> None:
    with decoding(graphed._engine, num_rows, options) as rows:
        rows.run(5)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        rows.run(20)  # at least one of them begins a block
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_a_mixed_run_takes_no_more_memory_than_the_one_before(graphed: LLMEngine) -> None:
    options = [each for each in MIX if "structured_output" not in each]  # begins when it is ready
    params = [SamplingParams(**{"temperature": 0.9, "seed": 1} | each) for each in options]
    prompts = PROMPTS[: len(params)]
    for _ in range(2):
        graphed.generate(prompts, params)
    before = torch.cuda.memory_stats()["num_device_alloc"]
    graphed.generate(prompts, params)
    assert torch.cuda.memory_stats()["num_device_alloc"] == before
