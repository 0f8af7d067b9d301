"""Log-probabilities of outputs and prompts: against `transformers`, and when they are told.

What the sampler makes of given logits is tested in `test_sampling.py`; here it is the whole way.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from engine.sampled_runs import Told, check_logprobs, logits_of, preempt, run_sequences
from engine.sampling_columns import resolved
from engine.scheduling import SWAP_IS_CHEAP, SWAP_IS_DEAR
from greedy_reference import GreedyReference
from mini_infer import EngineConfig, LLMEngine
from mini_infer.config import bundled_model
from mini_infer.messages import FinishCode
from mini_infer_engine.build import Engine, build_engine
from mini_infer_engine.sequence import Sequence, SequenceStatus, StreamKey
from mini_infer_engine.step_costs import StepCoefficients

BUDGET = 24
"""Tokens of a step."""


@pytest.fixture(scope="module")
def reference() -> GreedyReference:
    return GreedyReference(bundled_model("demo"))


@pytest.fixture(scope="module")
def small() -> Engine:
    """An engine whose prompts take several steps, and of which few fit at a time."""
    config = EngineConfig(
        max_num_seqs=4,
        kv_cache_tokens=16 * 24,
        max_model_len=128,
        max_num_batched_tokens=BUDGET,
        swap_space_gib=16 * 16 * 12_288 / 2**30,
    )
    return build_engine(config)


@pytest.fixture(autouse=True)
def whole(small: Engine) -> Iterator[None]:
    yield
    assert small.scheduler.is_idle
    assert small.pool.num_used == 0


def prompt_of(num_tokens: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(6, 900) for _ in range(num_tokens)]


def requested(
    engine: Engine, prompt: list[int], num_choices: int = 1, **options: object
) -> list[Sequence]:
    """Sequences of a request for prompt log-probabilities; others may be asked for besides."""
    given = {"max_tokens": 4, "ignore_eos": True, "num_prompt_logprobs": 2} | options
    keys = [StreamKey(b"", stream) for stream in range(num_choices)]
    return engine.served.sequences(
        keys, prompt, resolved(**given), cache_scope=("", ""), output_ids=()
    )


def check_prompt(reference: GreedyReference, prompt: list[int], told: Told, num_top: int) -> None:
    """Each token but the first was told once, in order, with what the model thought of it."""
    logits = logits_of(reference, prompt)[:-1]
    check_logprobs(logits, prompt[1:], told.prompt_logprobs, num_top)


# --- against transformers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    """Steps of 32 tokens, so that prompts take several."""
    config = EngineConfig(
        max_num_seqs=8, kv_cache_tokens=4096, max_model_len=512, max_num_batched_tokens=32
    )
    with LLMEngine(config) as made:
        yield made


def long_chat(length: int) -> list[dict[str, str]]:
    """A conversation of several times as many tokens as a step takes."""
    story = "Tell me about the old man, the sea and his three daughters, who sang. " * length
    return [{"role": "user", "content": story}]


@pytest.mark.parametrize("num_top", [0, 1, 20])
@pytest.mark.parametrize("is_warm", [False, True])
def test_logprobs_of_long_chats_are_the_log_softmax(
    engine: LLMEngine, reference: GreedyReference, num_top: int, is_warm: bool
) -> None:
    """Of three choices each, of which two share the prompt of the first."""
    chats = [long_chat(3), long_chat(5)]
    salt = f"{num_top} {is_warm}"
    if is_warm:
        engine.chat(chats, max_tokens=1, cache_salt=salt)
    options = {"temperature": 1.3, "top_p": 0.9, "seed": 3, "repetition_penalty": 1.2, "n": 3}
    outputs = engine.chat(
        chats,
        max_tokens=12,
        logprobs=num_top,
        prompt_logprobs=None if is_warm else num_top,
        cache_salt=salt,
        **options,
    )
    for output in outputs:
        prompt_ids = output.prompt_token_ids
        assert len(prompt_ids) > 48
        assert not is_warm or output.num_cached_tokens >= 32
        logits = logits_of(reference, [*prompt_ids, *output.token_ids])[:-1]
        before = len(prompt_ids) - 1
        check_logprobs(logits[before:], output.token_ids, output.logprobs, num_top)
        if is_warm or output.choice_index > 0:
            assert not output.prompt_logprobs
        else:
            check_logprobs(logits[:before], prompt_ids[1:], output.prompt_logprobs, num_top)


def test_logprobs_survive_preemption(small: Engine, reference: GreedyReference) -> None:
    """Sequences lose their blocks again and again, also in the middle of their prompts."""
    generator = random.Random(2)
    groups = []
    for stream in range(0, 16, 2):
        prompt = prompt_of(generator.randrange(1, 80), seed=stream)
        sampling = resolved(
            max_tokens=10, ignore_eos=True, num_logprobs=2, num_prompt_logprobs=3, seed=stream
        )
        keys = [StreamKey(b"", stream), StreamKey(b"", stream + 1)]
        groups.append(small.served.sequences(keys, prompt, sampling, cache_scope=("", "")))
    before = small.scheduler.counters()

    def before_step() -> None:
        running = list(small.scheduler._running)
        if running and generator.random() < 0.5:
            costs = generator.choice([SWAP_IS_CHEAP, SWAP_IS_DEAR])
            preempt(small, generator.choice(running), costs)

    told = run_sequences(small, groups, before_step)
    for group in groups:
        for choice, sequence in enumerate(group):
            output = told[sequence.key]
            num_before = sequence.num_prompt_tokens - 1
            logits = logits_of(reference, sequence.token_ids)[:-1]
            assert output.token_ids == sequence.token_ids[num_before + 1 :]
            check_logprobs(logits[num_before:], output.token_ids, output.logprobs, 2)
            if choice == 0:
                prompt_ids = sequence.token_ids[1 : num_before + 1]
                check_logprobs(logits[:num_before], prompt_ids, output.prompt_logprobs, 3)
            else:
                assert not output.prompt_logprobs
    after = small.scheduler.counters()
    assert after.num_swaps > before.num_swaps + 3
    assert after.num_recomputes > before.num_recomputes + 3


# --- when prompts are told ----------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 2, 3, BUDGET, BUDGET + 1, BUDGET + 2, 3 * BUDGET, 100])
@pytest.mark.parametrize("num_top", [0, 2])
def test_portions_follow_each_other_and_begin_with_the_second_token(
    small: Engine, reference: GreedyReference, num_tokens: int, num_top: int
) -> None:
    prompt = prompt_of(num_tokens)
    (sequence,) = requested(small, prompt, num_prompt_logprobs=num_top)
    told = run_sequences(small, [[sequence]])[sequence.key]
    assert told.code is FinishCode.LENGTH
    # A step scores the tokens behind those that it computes: none, where that is the last alone.
    expected = list(range(1, num_tokens, BUDGET))
    assert told.prompt_starts == expected
    check_prompt(reference, prompt, told, num_top)
    assert not told.logprobs


@pytest.mark.parametrize("costs", [SWAP_IS_CHEAP, SWAP_IS_DEAR], ids=["swap", "recompute"])
@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_what_was_told_before_a_preemption_is_not_told_again(
    small: Engine, reference: GreedyReference, costs: StepCoefficients, step: int
) -> None:
    """The prompt takes four steps; the fifth is the first one behind it."""
    prompt = prompt_of(4 * BUDGET - 3)
    (sequence,) = requested(small, prompt)
    before = small.scheduler.num_steps

    def before_step() -> None:
        if small.scheduler.num_steps == before + step and not sequence.num_preemptions:
            preempt(small, sequence, costs)

    told = run_sequences(small, [[sequence]], before_step)[sequence.key]
    assert sequence.num_preemptions == 1
    assert told.prompt_starts == [1, BUDGET + 1, 2 * BUDGET + 1, 3 * BUDGET + 1]
    check_prompt(reference, prompt, told, 2)


def test_a_cached_prompt_is_computed_again_and_is_not_offered_to_others(
    small: Engine, reference: GreedyReference
) -> None:
    prompt = prompt_of(70, seed=9)

    def run(**options: object) -> tuple[Sequence, Told]:
        (sequence,) = requested(small, prompt, **options)
        return sequence, run_sequences(small, [[sequence]])[sequence.key]

    plain = {"num_prompt_logprobs": -1}
    first, told = run()
    check_prompt(reference, prompt, told, 2)
    second, _ = run(**plain)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 0)
    third, _ = run(**plain)
    assert third.num_cached_tokens >= 64
    fourth, told = run()
    assert fourth.num_cached_tokens == 0
    check_prompt(reference, prompt, told, 2)


def test_choice_0_alone_tells_and_the_others_share_its_prompt(
    small: Engine, reference: GreedyReference
) -> None:
    prompt = prompt_of(60, seed=4)
    group = requested(small, prompt, num_choices=3)
    told = run_sequences(small, [group])
    check_prompt(reference, prompt, told[group[0].key], 2)
    assert [told[each.key].prompt_starts for each in group[1:]] == [[], []]
    assert [each.num_cached_tokens for each in group] == [0, 59, 59]


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4])
def test_a_sequence_aborted_in_its_prompt_tells_no_more(small: Engine, step: int) -> None:
    prompt = prompt_of(4 * BUDGET - 3)
    (sequence,) = requested(small, prompt)
    neighbour = small.served.sequences(
        [StreamKey(b"", 9)], prompt_of(2), resolved(max_tokens=8, ignore_eos=True)
    )
    before = small.scheduler.num_steps

    def before_step() -> None:
        if small.scheduler.num_steps == before + step:
            small.scheduler.abort(sequence.key, 0.0)

    told = run_sequences(small, [[sequence], neighbour], before_step)
    assert sequence.status is SequenceStatus.ENDED
    starts = told[sequence.key].prompt_starts
    assert len(starts) == step
    num_told = len(told[sequence.key].prompt_logprobs)
    # The neighbour joins in one of these steps and takes tokens of it.
    assert step * BUDGET - 9 <= num_told <= step * BUDGET
    assert len(told[neighbour[0].key].token_ids) == 8


def test_a_step_that_was_launched_before_an_abort_tells_nothing(small: Engine) -> None:
    (sequence,) = requested(small, prompt_of(50))
    scheduler = small.scheduler
    scheduler.add(sequence, now=0.0)
    batch = scheduler.schedule(0.0)
    scheduler.abort(sequence.key, 0.0)
    updates = scheduler.finish_step(batch, small.runner.run(batch), 0.0)
    assert updates.is_empty


def test_several_prompts_of_different_wishes_share_steps(
    small: Engine, reference: GreedyReference
) -> None:
    """With decoding rows before them, and with rows that want nothing between them."""
    wishes = [-1, 0, 5, -1, 20, 1, -1, 3]
    groups = []
    for stream, num_top in enumerate(wishes):
        sampling = resolved(
            max_tokens=3 + stream, ignore_eos=True, num_prompt_logprobs=num_top, temperature=0.0
        )
        prompt = prompt_of(1 + 7 * stream, seed=stream)
        groups.append(small.served.sequences([StreamKey(b"", stream)], prompt, sampling))
    told = run_sequences(small, groups)
    for num_top, (sequence,) in zip(wishes, groups, strict=True):
        output = told[sequence.key]
        prompt = sequence.token_ids[: sequence.num_prompt_tokens]
        if num_top < 0:
            assert not output.prompt_logprobs
        else:
            check_prompt(reference, prompt, output, num_top)
            assert output.prompt_starts == sorted(set(output.prompt_starts))


def test_the_one_token_prompt_has_nothing_to_tell(engine: LLMEngine) -> None:
    (output,) = engine.generate([[9]], max_tokens=2, prompt_logprobs=3, ignore_eos=True)
    assert output.prompt_logprobs == []
    assert len(output.token_ids) == 2
