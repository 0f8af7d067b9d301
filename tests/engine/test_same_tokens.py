"""The same seed and request give the same tokens, whatever happens around the request."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import msgspec
import pytest
from engine.sampled_runs import DrawComparison, Told, preempt, run_sequences
from engine.sampling_columns import resolved
from engine.scheduling import SWAP_IS_CHEAP, SWAP_IS_DEAR
from greedy_reference import GreedyReference
from mini_infer import EngineConfig
from mini_infer.config import bundled_model
from mini_infer.messages import FinishCode
from mini_infer.resolved_sampling import MAX_SEED, RepetitionLimit, ResolvedSampling
from mini_infer.structured_output import Grammar, GrammarKind
from mini_infer_engine.build import Engine, build_engine
from mini_infer_engine.sequence import Sequence, StreamKey
from mini_infer_engine.step_costs import StepCoefficients
from mini_infer_tokenizer.encode import TextTokenizer

TOKENIZER = TextTokenizer(bundled_model("demo"))
PROMPT = TOKENIZER.encode("Once upon a time there was a fox who lived near the river.", True)
OTHER_PROMPT = TOKENIZER.encode("Tell me about the three daughters of the old man " * 3, True)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "the_kind_of_the_animal": {"enum": ["fox", "raven", "ravenous lion"]},
        "a_description_of_its_home": {"const": "the forest behind the great river"},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "the_kind_of_the_animal", "a_description_of_its_home", "age"],
    "additionalProperties": False,
}
SHORT_SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a fox", "a raven"]}, "count": {"type": "integer"}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
COMMON = [TOKENIZER.encode(each, False) for each in (" the", " a", ",", ".", " was", " lived in")]


def grammar(kind: GrammarKind, source: object) -> Grammar:
    return Grammar(kind, source if isinstance(source, str) else json.dumps(source))


JSON = grammar(GrammarKind.JSON_SCHEMA, SCHEMA)
KINDS: dict[str, dict[str, object]] = {
    "temperature": {"temperature": 1.3},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.8, "temperature": 1.5},
    "min_p": {"min_p": 0.05, "temperature": 1.5},
    "typical_p": {"typical_p": 0.6, "temperature": 1.2},
    "all truncations": {
        "temperature": 2.0,
        "top_k": 100,
        "top_p": 0.95,
        "min_p": 0.001,
        "typical_p": 0.9,
    },
    "penalties": {
        "repetition_penalty": 1.5,
        "presence_penalty": 0.7,
        "frequency_penalty": -1.0,
        "temperature": 1.2,
    },
    "greedy penalties": {"temperature": 0.0, "frequency_penalty": 2.0, "presence_penalty": 1.0},
    "bias": {"bias_ids": [300, 301, *COMMON[0]], "bias_values": [5.0, -100.0, -100.0]},
    "bad words": {"bad_words": [*COMMON, [*PROMPT[-2:], 400]], "temperature": 1.5},
    "min_tokens": {
        "min_tokens": 12,
        "stop_token_ids": [each[0] for each in COMMON],
        "ignore_eos": False,
    },
    "allowed ids": {"allowed_token_ids": list(range(200, 900, 3)), "top_p": 0.9},
    "repetition": {
        "allowed_token_ids": [300, 301],
        "repetition": RepetitionLimit(1, 4, 4),
        "min_tokens": 6,
    },
    "json": {"grammar": JSON, "max_tokens": 90},
    "json, penalised": {
        "grammar": JSON,
        "max_tokens": 90,
        "repetition_penalty": 1.3,
        "top_k": 40,
        "frequency_penalty": 0.5,
    },
    "json, ids of its own": {
        "grammar": grammar(GrammarKind.JSON_SCHEMA, SHORT_SCHEMA),
        "max_tokens": 60,
        "bad_words": COMMON[:3],
    },
    "json, cut": {"grammar": JSON, "max_tokens": 20},
    "choice": {
        "grammar": grammar(
            GrammarKind.CHOICE,
            ["the fox ran into the dark forest", "the fox ran home", "nobody knows anything"],
        )
    },
    "one choice": {"grammar": grammar(GrammarKind.CHOICE, ["there is but one possible answer"])},
    "regex": {
        "grammar": grammar(GrammarKind.REGEX, r"Name: [A-Z][a-z]{2,6}; number: 00[0-9]{3}-[ab]+!")
    },
}


def sampling_of(kind: str, **options: object) -> ResolvedSampling:
    seed = list(KINDS).index(kind)
    given = {"max_tokens": 24, "ignore_eos": "grammar" not in KINDS[kind], "seed": seed}
    return resolved(**{**given, **KINDS[kind], **options})


def build(max_num_seqs: int, num_blocks: int, budget: int) -> Engine:
    """Of 16 tokens a block."""
    config = EngineConfig(
        max_num_seqs=max_num_seqs,
        kv_cache_tokens=16 * num_blocks,
        max_model_len=208,
        max_num_batched_tokens=budget,
        swap_space_gib=16 * 16 * 12_288 / 2**30,
    )
    return build_engine(config)


@pytest.fixture(scope="module")
def engine() -> Engine:
    """With room for ten sequences, in steps of 40 tokens."""
    return build(max_num_seqs=10, num_blocks=100, budget=40)


@dataclass
class Alone:
    """What each kind of request gets when nothing else runs.

    Attributes:
        engine: Runs them.
        comparison: Of other outputs with theirs.
    """

    engine: Engine
    comparison: DrawComparison

    def __post_init__(self) -> None:
        self._told: dict[bytes, Told] = {}

    def of(self, prompt: Seq[int], sampling: ResolvedSampling) -> Told:
        """The output of a request, which does not tell log-probabilities."""
        plain = msgspec.structs.replace(sampling, num_logprobs=-1, num_prompt_logprobs=-1)
        key = msgspec.msgpack.encode([list(prompt), plain])
        if key not in self._told:
            (sequence,) = self.engine.served.sequences([StreamKey(b"", 0)], prompt, plain)
            self._told[key] = run_sequences(self.engine, [[sequence]])[sequence.key]
        return self._told[key]

    def check(self, sequence: Sequence, told: Told, num_resumed: int = 0) -> None:
        """Asserts that a sequence got what it gets alone, from some token on.

        Raises:
            AssertionError: It did not, and the draw was clear.
        """
        prompt = sequence.token_ids[: sequence.num_prompt_tokens]
        alone = self.of(prompt, sequence.sampling)
        output = [*alone.token_ids[:num_resumed], *told.token_ids]
        assert told.error is None
        if self.comparison.add(prompt, sequence.sampling, alone.token_ids, output):
            assert told.code is alone.code
        has_logprobs = sequence.sampling.num_logprobs >= 0
        assert len(told.logprobs) == (len(told.token_ids) if has_logprobs else 0)


@pytest.fixture(scope="module")
def alone() -> Alone:
    """With an engine of its own, that has room for one sequence and sees prompts whole."""
    engine = build(max_num_seqs=1, num_blocks=14, budget=208)
    comparison = DrawComparison(engine, GreedyReference(bundled_model("demo")))
    return Alone(engine, comparison)


def run_kinds(
    engine: Engine,
    generator: random.Random,
    samplings: Seq[ResolvedSampling],
    before_step: Callable[[], None] = lambda: None,
) -> list[tuple[Sequence, Told]]:
    """Runs requests together, with prompts and classes drawn."""
    groups = [
        engine.served.sequences(
            [StreamKey(b"", stream)],
            generator.choice([PROMPT, PROMPT, OTHER_PROMPT]),
            sampling,
            priority=generator.randint(-1, 1),
            cache_scope=("", generator.choice(["", "salt"])),
        )
        for stream, sampling in enumerate(samplings)
    ]
    told = run_sequences(engine, groups, before_step)
    return [(sequence, told[sequence.key]) for (sequence,) in groups]


def test_the_kinds_are_worth_their_names(alone: Alone) -> None:
    """They end as they should, and no two draw the same text."""
    told = {kind: alone.of(PROMPT, sampling_of(kind)) for kind in KINDS}
    codes = {kind: each.code for kind, each in told.items()}
    assert all(each.error is None for each in told.values())
    assert codes["repetition"] is FinishCode.REPETITION
    assert codes["min_tokens"] is FinishCode.STOP_TOKEN
    assert codes["json, cut"] is codes["temperature"] is FinishCode.LENGTH
    assert codes["one choice"] is codes["choice"] is FinishCode.GRAMMAR
    for kind in ("json", "json, penalised", "json, ids of its own"):
        assert codes[kind] is FinishCode.GRAMMAR
        value = json.loads(TOKENIZER.decode(told[kind].token_ids, False))
        expected = SHORT_SCHEMA if kind == "json, ids of its own" else SCHEMA
        assert list(value) == expected["required"]
    outputs = {tuple(each.token_ids) for each in told.values()}
    assert len(outputs) >= len(KINDS) - 2  # the kinds of JSON may agree


@pytest.mark.parametrize("kind", ["all truncations", "penalties", "min_tokens", "json", "regex"])
def test_a_clear_difference_is_not_taken_for_a_near_tie(alone: Alone, kind: str) -> None:
    """The judge of the tests below draws what the engine draws, and nothing else."""
    sampling = sampling_of(kind)
    output = alone.of(PROMPT, sampling).token_ids
    judge = DrawComparison(alone.engine, alone.comparison.reference)
    for position in range(0, len(output), 5):
        changed = [*output[:position], output[position] + 1, *output[position + 1 :]]
        near = re.escape(f"near are {{{output[position]}}}")
        with pytest.raises(AssertionError, match=near):
            judge.add(PROMPT, sampling, output, changed)


@pytest.mark.parametrize("seed", range(3))
def test_in_any_batch(engine: Engine, alone: Alone, seed: int) -> None:
    generator = random.Random(seed)
    kinds = [*KINDS, *generator.choices(list(KINDS), k=10)]
    generator.shuffle(kinds)
    samplings = [sampling_of(kind, num_logprobs=generator.choice([-1, -1, 0, 5])) for kind in kinds]
    for sequence, told in run_kinds(engine, generator, samplings):
        alone.check(sequence, told)


@pytest.mark.parametrize("costs", [SWAP_IS_CHEAP, SWAP_IS_DEAR], ids=["swap", "recompute"])
def test_after_preemption(alone: Alone, costs: StepCoefficients) -> None:
    """In a cache that holds four of them, and with more preemptions than that makes.

    Several at once, so that sequences come back to each other's slots.
    """
    engine = build(max_num_seqs=6, num_blocks=24, budget=24)
    generator = random.Random(7)

    def before_step() -> None:
        running = list(engine.scheduler._running)
        if running and generator.random() < 0.25:
            for victim in generator.sample(running, generator.randint(1, min(3, len(running)))):
                preempt(engine, victim, costs)

    kinds = [*KINDS, *["penalties", "greedy penalties"] * 3]
    generator.shuffle(kinds)
    samplings = [sampling_of(kind, num_logprobs=index % 2 - 1) for index, kind in enumerate(kinds)]
    outputs = run_kinds(engine, generator, samplings, before_step)
    for sequence, told in outputs:
        alone.check(sequence, told)
    num_preempted = sum(sequence.num_preemptions > 0 for sequence, _ in outputs)
    assert num_preempted > len(kinds) * 3 / 4
    counters = engine.scheduler.counters()
    counted = counters.num_swaps if costs is SWAP_IS_CHEAP else counters.num_recomputes
    assert counted > 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_choices_are_those_of_their_seeds(engine: Engine, alone: Alone, kind: str) -> None:
    """The seed after the greatest is 0."""
    sampling = sampling_of(kind, seed=MAX_SEED - 1, max_tokens=30)
    keys = [StreamKey(b"", choice) for choice in range(4)]
    group = engine.served.sequences(keys, PROMPT, sampling, cache_scope=("", ""))
    assert [each.sampling.seed for each in group] == [MAX_SEED - 1, MAX_SEED, 0, 1]
    told = run_sequences(engine, [group])
    for sequence in group:
        alone.check(sequence, told[sequence.key])


@pytest.mark.parametrize("num_logprobs", [-1, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_behind_any_prefix(
    engine: Engine, alone: Alone, kind: str, num_logprobs: int
) -> None:
    """Prefixes that end in the middle of what is forced are among them.

    Those that tell log-probabilities take as many steps as tokens: every third of them is tried.
    """
    sampling = sampling_of(kind, num_logprobs=num_logprobs)
    whole = alone.of(PROMPT, sampling)
    cuts = range(0, len(whole.token_ids), 1 if num_logprobs < 0 else 3)
    groups = [
        engine.served.sequences(
            [StreamKey(b"", cut)], PROMPT, sampling, output_ids=whole.token_ids[:cut]
        )
        for cut in cuts
    ]
    told = run_sequences(engine, groups)
    for cut, (sequence,) in zip(cuts, groups, strict=True):
        alone.check(sequence, told[sequence.key], num_resumed=cut)


def test_the_end_of_a_language_is_found_behind_a_whole_output(engine: Engine, alone: Alone) -> None:
    """An output whose end was lost on the way ends again, without a step."""
    sampling = sampling_of("choice")
    whole = alone.of(PROMPT, sampling)
    before = engine.scheduler.num_steps
    group = engine.served.sequences(
        [StreamKey(b"", 0)], PROMPT, sampling, output_ids=whole.token_ids
    )
    told = run_sequences(engine, [group])[group[0].key]
    assert (told.token_ids, told.code) == ([], FinishCode.GRAMMAR)
    assert engine.scheduler.num_steps == before


@pytest.mark.parametrize("position", [0, 8, 30])
def test_stop_ids_among_forced_tokens_mean_the_same_with_logprobs(
    engine: Engine, alone: Alone, position: int
) -> None:
    """A stop id in what must follow, at positions where `min_tokens` forbids to stop."""
    stop_id = alone.of(PROMPT, sampling_of("json")).token_ids[position]
    outcomes = []
    for num_logprobs in (-1, 0):
        sampling = sampling_of(
            "json", min_tokens=80, stop_token_ids=[stop_id], num_logprobs=num_logprobs
        )
        group = engine.served.sequences([StreamKey(b"", 0)], PROMPT, sampling)
        told = run_sequences(engine, [group])[group[0].key]
        outcomes.append((told.token_ids, told.code, told.error and told.error.reason))
    assert outcomes[0] == outcomes[1]


def test_near_ties_were_rare(alone: Alone) -> None:
    """Of all the tests above."""
    alone.comparison.check()
