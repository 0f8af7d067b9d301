"""Every architecture against `transformers`: logits of each position, and greedy tokens.

Models are drawn at random and small; their folders are written by `transformers` and read by our
loader. What must hold is the same for all of them: whole prompts, chunks of prompts and single
tokens, alone or beside others, recorded or not, give the reference's logits. `pytest -s` shows the
worst errors.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from architectures.checkpoints import random_model, write_folder, write_older_form
from architectures.drawn_configs import CONFIGS, MAX_TEXT, SCALED, llama_configs
from architectures.paged import (
    Rows,
    Texts,
    eager,
    recorded,
    run_forced,
    run_greedily,
    shuffled_pool,
)
from architectures.reference import Continuation, Continuations, StepwiseReference
from greedy_reference import GreedyComparison
from hypothesis import Phase, assume, given, seed, settings
from hypothesis import strategies as st
from mini_infer.config import EngineConfig
from mini_infer_engine.block_pool import BlockPool
from mini_infer_engine.build import Engine, build_engine
from mini_infer_engine.model_config import SUPPORTED_ARCHITECTURES, read_model_config
from transformers import AutoConfig, PretrainedConfig

NUM_TOKENS = 64
"""Greedy tokens of each prompt."""
MAX_ERROR = 1e-5
"""Of a position's logits: the difference's norm over the reference's."""
MAX_PROMPT = MAX_TEXT - NUM_TOKENS


@dataclass(frozen=True)
class Case:
    """A model, and how it is run."""

    config: PretrainedConfig
    seed: int
    prompt_lens: list[int]
    block_size: int
    max_step_tokens: int
    spare_blocks: int
    type_key: str | None

    def __repr__(self) -> str:
        """Enough to build it again."""
        fields = {key: value for key, value in vars(self).items() if key != "config"}
        return f"{type(self.config).__name__} {self.config.to_diff_dict()} {fields}"


@dataclass
class Tally:
    """What was compared so far."""

    continuations: Continuations = field(default_factory=Continuations)
    seen: set[str] = field(default_factory=set)
    num_rows: int = 0
    worst_error: float = 0.0
    num_hit_tokens: int = 0

    def __post_init__(self) -> None:
        self.greedy = GreedyComparison(self.continuations)

    def __str__(self) -> str:
        """The figures."""
        return (
            f"{len(self.seen)} models, {self.num_rows} rows of logits, worst error "
            f"{self.worst_error:.1e}; {self.greedy.num_tokens} greedy tokens, near-ties: "
            f"{self.greedy.near_ties}; {self.num_hit_tokens} tokens of known prefixes"
        )


def cases(configs: st.SearchStrategy[PretrainedConfig]) -> st.SearchStrategy[Case]:
    """Draws models, and how they are run."""
    return st.builds(
        Case,
        config=configs.filter(reference_can_step),
        seed=st.integers(0, 2**16),
        prompt_lens=st.lists(st.integers(1, MAX_PROMPT), min_size=3, max_size=3),
        block_size=st.integers(1, 16),
        max_step_tokens=st.sampled_from([3, 7, 16, 29]),
        spare_blocks=st.sampled_from([0, 2, 8, 200]),
        type_key=st.sampled_from([None, "rope_type", "type"]),
    )


def reference_can_step(config: PretrainedConfig) -> bool:
    """With a window of one token it recomputes all, which is another thing for dynamic bases."""
    rope = config.rope_parameters
    return getattr(config, "sliding_window", None) != 1 or rope.get("rope_type") != "dynamic"


def compare(case: Case, tally: Tally) -> None:
    """Runs a case in every way; adds what came of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(random_model(case.config, case.seed), folder)
        reference = StepwiseReference(folder)
        if case.type_key is not None:
            write_older_form(folder, case.type_key)
        engine = build(case, folder)
    continuations = [reference.continue_greedily(ids, NUM_TOKENS) for ids in prompts(case)]
    for each in continuations:
        tally.continuations.add(each)
    errors = [
        error
        for texts, rows in forced_runs(case, engine, continuations)
        for error in compared(case, continuations, texts, rows)
    ]
    too_far = [error for error in errors if not error <= MAX_ERROR]
    assert not too_far, (len(too_far), len(errors), too_far[:9])
    # Their halves first, so that prefixes are known where the model allows that.
    halves = [prompt_ids[: -(-len(prompt_ids) // 2)] for prompt_ids in prompts(case)]
    run_greedily(engine, halves, [1] * len(halves))
    for _ in range(2):
        outputs = run_greedily(engine, prompts(case), [NUM_TOKENS] * len(continuations))
        for each, output in zip(continuations, outputs, strict=True):
            tally.greedy.add(each.prompt_ids, each.output_ids, output)
    tally.num_hit_tokens += engine.scheduler.counters().num_hit_tokens
    tally.num_rows += len(errors)
    tally.worst_error = max(tally.worst_error, *errors)


def build(case: Case, folder: Path) -> Engine:
    """The engine as it is built for a user."""
    num_tokens = (len(case.prompt_lens) + 1) * (MAX_TEXT + case.block_size)
    config = EngineConfig(
        model=str(folder),
        device="cpu",
        dtype="float32",
        block_size=case.block_size,
        kv_cache_tokens=num_tokens,
        max_num_seqs=3,
        max_num_batched_tokens=case.max_step_tokens,
    )
    return build_engine(config, merge_decode_steps=True)


def prompts(case: Case) -> list[list[int]]:
    """Random ids."""
    generator = torch.Generator().manual_seed(case.seed)
    vocab_size = case.config.vocab_size
    return [
        torch.randint(vocab_size, (length,), generator=generator).tolist()
        for length in case.prompt_lens
    ]


def forced_runs(
    case: Case, engine: Engine, continuations: list[Continuation]
) -> Iterator[tuple[Texts, list[Rows]]]:
    """Whole prompts; chunks in few blocks, which takes some back; one text alone, not gathered."""
    # Outputs of different lengths, so that rows leave one by one.
    texts = [
        (each.prompt_ids, each.output_ids[: NUM_TOKENS - 16 * index])
        for index, each in enumerate(continuations)
    ]
    num_blocks = engine.runner.cache.num_blocks
    longest = max(len(prompt) + len(output) for prompt, output in texts)
    few = min(num_blocks, -(-longest // case.block_size) + case.spare_blocks)
    every_block = shuffled_pool(engine, num_blocks, case.seed)
    few_blocks = shuffled_pool(engine, few, case.seed)
    neighbours = BlockPool(num_blocks, case.block_size)
    yield texts, run_forced(engine, eager(engine), texts, every_block, MAX_TEXT * len(texts))
    yield texts, run_forced(engine, recorded(engine), texts, few_blocks, case.max_step_tokens)
    alone = texts[:1]
    yield alone, run_forced(engine, recorded(engine), alone, neighbours, MAX_TEXT)


def compared(
    case: Case, continuations: list[Continuation], texts: Texts, rows: list[Rows]
) -> list[float]:
    """The error of each row; asserts that there is one for each position of each text."""
    errors: list[float] = []
    missing = {
        (index, position)
        for index, (prompt, output) in enumerate(texts)
        for position in range(len(prompt) + len(output) - 1)
    }
    for part in rows:
        expected = continuations[part.text]
        for position, logits in enumerate(part.logits, part.start):
            if same_rotations(case, expected, position, part.num_known):
                missing.discard((part.text, position))
                reference = expected.logits[position]
                errors.append(float((logits - reference).norm() / reference.norm()))
    assert not missing, f"not compared: {sorted(missing)}"
    return errors


def same_rotations(case: Case, expected: Continuation, position: int, num_known: int) -> bool:
    """Whether the reference computed a position with the factors that our step used.

    Behind its original context, longrope computes the text again with other factors.
    """
    rope = case.config.rope_parameters
    if rope.get("rope_type") != "longrope":
        return True
    switch = case.config.original_max_position_embeddings
    then = max(len(expected.prompt_ids), position + 1)
    return bool((then > switch) == (num_known > switch))


def compare_drawn(
    configs: st.SearchStrategy[PretrainedConfig], num_rounds: int, models_per_round: int
) -> None:
    """Compares models, no two alike.

    In rounds, because hypothesis repeats parts of what it drew before from the eleventh on.
    """
    tally = Tally()
    for number in range(num_rounds):
        # Not shrunk: what fails is small already.
        @seed(number)
        @settings(
            max_examples=models_per_round,
            database=None,
            deadline=None,
            phases=[Phase.generate],
        )
        @given(case=cases(configs))
        def check(case: Case) -> None:
            description = json.dumps(case.config.to_dict(), sort_keys=True)
            assume(description not in tally.seen)
            compare(case, tally)
            # Only now: what fails is run again for the report.
            tally.seen.add(description)

        check()
    tally.greedy.check()
    print(tally)
    assert tally.num_hit_tokens > 0
    assert len(tally.seen) == num_rounds * models_per_round


@pytest.mark.parametrize("architecture", CONFIGS)
def test_logits_and_greedy_tokens_equal_those_of_transformers(architecture: str) -> None:
    compare_drawn(CONFIGS[architecture], num_rounds=1, models_per_round=4)


@pytest.mark.parametrize("kind", SCALED)
def test_each_rotary_embedding(kind: str) -> None:
    compare_drawn(llama_configs(rope_kinds=(kind,)), num_rounds=1, models_per_round=2)


def test_every_architecture_is_drawn() -> None:
    assert CONFIGS.keys() == set(SUPPORTED_ARCHITECTURES)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_many_models_equal_those_of_transformers(architecture: str) -> None:
    compare_drawn(CONFIGS[architecture], num_rounds=3, models_per_round=10)


@pytest.mark.parametrize("type_key", ["rope_type", "type"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_older_config_files_mean_the_same(architecture: str, type_key: str) -> None:
    @seed(0)
    @settings(max_examples=20, database=None, deadline=None)
    @given(config=CONFIGS[architecture])
    def check(config: PretrainedConfig) -> None:
        config.architectures = [architecture]
        config.dtype = "bfloat16"
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            config.save_pretrained(folder)
            expected = read_model_config(folder)
            expected_by_transformers = meaning(folder)
            write_older_form(folder, type_key)
            assert meaning(folder) == expected_by_transformers, "the test's own form is wrong"
            assert read_model_config(folder) == expected
        assert expected.checkpoint_dtype == "bfloat16"

    check()


def meaning(folder: Path) -> dict[str, object]:
    """What `transformers` makes of a folder's config.json, without the keys that say it."""
    fields = AutoConfig.from_pretrained(folder).to_dict()
    for rope in (fields["rope_parameters"], *fields["rope_parameters"].values()):
        if isinstance(rope, dict):
            rope.pop("type", None)
    ways_to_say_it = ("rope_theta", "partial_rotary_factor", "rope_local_base_freq")
    ways_to_say_it += ("sliding_window_pattern", "_sliding_window_pattern")
    return {key: value for key, value in fields.items() if key not in ways_to_say_it}
