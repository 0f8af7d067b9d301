"""The in-process engine: what users call."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from mini_infer import ConfigError, EngineConfig, InvalidRequestError, LLMEngine, MiniInferError
from mini_infer.errors import ErrorReason
from mini_infer.sampling_params import SamplingParams
from mini_infer_engine.batch import FillMasks, LaunchedTokens, ScheduledBatch

STORY = "Once upon a time"


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    with LLMEngine(EngineConfig(max_num_seqs=8, kv_cache_tokens=4096)) as made:
        yield made


@pytest.fixture(autouse=True)
def whole(engine: LLMEngine) -> Iterator[None]:
    yield
    parts = engine._engine
    parts.scheduler.check_integrity()
    assert parts.scheduler.is_idle
    assert parts.pool.num_used == 0


def test_greedy_is_repeatable_and_text_belongs_to_ids(engine: LLMEngine) -> None:
    (first,), (second,) = (
        engine.generate(STORY, max_tokens=40, temperature=0, ignore_eos=True) for _ in range(2)
    )
    assert first.token_ids == second.token_ids
    assert len(first.token_ids) == 40
    assert first.finish_reason == "length"
    assert first.text == engine._tokenizer.decode(first.token_ids, True)
    assert first.prompt_token_ids == engine._tokenizer.encode(STORY, True)


def test_outputs_keep_the_order_of_prompts_and_equal_those_alone(engine: LLMEngine) -> None:
    prompts = [STORY + " there was a" * index for index in range(20)]
    together = engine.generate(prompts, max_tokens=12, temperature=0.8, seed=5)
    for prompt, output in zip(prompts, together, strict=True):
        (alone,) = engine.generate(prompt, max_tokens=12, temperature=0.8, seed=5)
        assert alone.token_ids == output.token_ids


def test_a_drawn_seed_is_reported_and_repeats_the_output(engine: LLMEngine) -> None:
    (drawn,) = engine.generate(STORY, max_tokens=20, temperature=1.5)
    (again,) = engine.generate(STORY, max_tokens=20, temperature=1.5, seed=drawn.seed)
    assert again.token_ids == drawn.token_ids
    (other,) = engine.generate(STORY, max_tokens=20, temperature=1.5)
    assert other.seed != drawn.seed


def test_absent_fields_take_the_folders_defaults(engine: LLMEngine) -> None:
    assert engine._engine.served.defaults.temperature > 0
    (default,) = engine.generate(STORY, max_tokens=30, seed=1)
    (greedy,) = engine.generate(STORY, max_tokens=30, seed=1, temperature=0)
    assert default.token_ids != greedy.token_ids


def test_a_stop_string_ends_at_the_token_that_completes_it(engine: LLMEngine) -> None:
    (whole,) = engine.generate(STORY, max_tokens=40, temperature=0, ignore_eos=True)
    stop = whole.text[20:26]
    begin = whole.text.index(stop)
    options = dict(max_tokens=40, temperature=0, ignore_eos=True, stop=["§", stop])
    (cut,) = engine.generate(STORY, **options)
    assert (cut.text, cut.finish_reason, cut.stop_string) == (whole.text[:begin], "stop", stop)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    decoded = engine._tokenizer.decode(cut.token_ids, True)
    assert stop in decoded
    (same,) = engine.generate(STORY, **options | {"stop": stop})
    assert same.text == cut.text
    assert stop not in engine._tokenizer.decode(cut.token_ids[:-1], True)
    (kept,) = engine.generate(STORY, include_stop_str_in_output=True, **options)
    assert kept.text == whole.text[: begin + len(stop)]


def test_stop_ids_end_inclusively_and_min_tokens_delays_them(engine: LLMEngine) -> None:
    (whole,) = engine.generate(STORY, max_tokens=10, temperature=0, ignore_eos=True)
    stop_id = whole.token_ids[3]
    first = whole.token_ids.index(stop_id)
    (cut,) = engine.generate(STORY, max_tokens=10, temperature=0, stop_token_ids=[stop_id])
    assert cut.token_ids == whole.token_ids[: first + 1]
    assert (cut.finish_reason, cut.stop_token_id) == ("stop", stop_id)
    (later,) = engine.generate(
        STORY, max_tokens=10, temperature=0, stop_token_ids=[stop_id], min_tokens=first + 2
    )
    assert len(later.token_ids) >= first + 2
    assert stop_id not in later.token_ids[: first + 2]


def test_chat_uses_the_template(engine: LLMEngine) -> None:
    conversation = [{"role": "user", "content": "Tell me a story about a fox."}]
    (output,) = engine.chat(conversation, max_tokens=5, temperature=0)
    prompt = engine._tokenizer.decode(output.prompt_token_ids, False)
    assert "Tell me a story about a fox." in prompt
    assert len(prompt) > len(conversation[0]["content"])
    both = engine.chat([conversation, conversation], max_tokens=5, temperature=0)
    assert [each.token_ids for each in both] == [output.token_ids] * 2


def test_more_prompts_than_may_wait_are_fed_in_by_and_by() -> None:
    config = EngineConfig(max_num_seqs=2, max_queued_requests=3, kv_cache_tokens=1024)
    with LLMEngine(config) as small:
        outputs = small.generate([[5 + each] for each in range(12)], max_tokens=3, ignore_eos=True)
    assert [len(each.token_ids) for each in outputs] == [3] * 12


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "at least one token"),
        ([[4096]], {}, r"prompts\[0\].*from 0 to 4095"),
        ([[5], [-1]], {}, r"prompts\[1\]"),
        ([5], {}, "a text or a list of token ids, got 5"),
        ([["a"]], {}, "a text or a list of token ids"),
        (STORY, {"max_tokens": 0}, "max_tokens"),
        (STORY, {"max_tokens": 5000}, "context holds 4096"),
        ([[5] * 4096], {}, "context holds 4096"),
        (STORY, {"temperature": float("nan"), "top_p": 1.5}, r"temperature.*top_p"),
    ],
)
def test_bad_requests_are_typed_errors(
    engine: LLMEngine, prompts: object, options: dict[str, object], message: str
) -> None:
    with pytest.raises(MiniInferError, match=message):
        engine.generate(prompts, **options)


def test_each_prompt_may_have_its_own_params(engine: LLMEngine) -> None:
    each = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (3, 5)]
    outputs = engine.generate([STORY, STORY], each)
    assert [len(output.token_ids) for output in outputs] == [3, 5]
    with pytest.raises(ValueError, match="params for 1 prompts, got 2"):
        engine.generate(STORY, each)
    with pytest.raises(TypeError, match="not both"):
        engine.generate(STORY, each[0], max_tokens=3)


def test_violations_come_all_at_once(engine: LLMEngine) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        engine.generate(STORY, SamplingParams(temperature=-1, top_k=-1, top_p=0, max_tokens=0))
    fields = [violation.field for violation in caught.value.violations]
    assert fields == [
        "sampling.temperature",
        "sampling.top_k",
        "sampling.top_p",
        "stopping.max_tokens",
    ]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_call_leaves_nothing_behind(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException]
) -> None:
    (expected,) = engine.generate(STORY, max_tokens=8, temperature=0)
    launch, num_runs = engine._engine.runner.launch, 0

    def launch_thrice(batch: ScheduledBatch, fill_masks: FillMasks) -> LaunchedTokens:
        nonlocal num_runs
        num_runs += 1
        if num_runs > 3:
            raise interrupt
        return launch(batch, fill_masks)

    with monkeypatch.context() as patch:
        patch.setattr(engine._engine.runner, "launch", launch_thrice)
        with pytest.raises(interrupt):
            engine.generate([STORY] * 4, max_tokens=50, ignore_eos=True)
    assert engine._engine.pool.num_used == 0
    (again,) = engine.generate(STORY, max_tokens=8, temperature=0)
    assert again.token_ids == expected.token_ids


def test_the_context_is_what_the_cache_holds() -> None:
    with LLMEngine(EngineConfig(kv_cache_tokens=64)) as small:
        (output,) = small.generate([[5]], temperature=0, ignore_eos=True)
        assert len(output.token_ids) == 63
        with pytest.raises(MiniInferError, match="context holds 64") as caught:
            small.generate([[5], [5] * 100], max_tokens=10)
        assert caught.value.reason is ErrorReason.CONTEXT_LENGTH_EXCEEDED
    with pytest.raises(ConfigError, match="more than the 64 tokens"):
        LLMEngine(EngineConfig(kv_cache_tokens=64, max_model_len=65))


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "dropped"])
def test_the_weights_memory_is_given_back(is_closed: bool) -> None:
    engine = LLMEngine(EngineConfig(kv_cache_tokens=512))
    weights = [each.untyped_storage() for each in engine._engine.model.destinations().values()]
    assert sum(each.nbytes() for each in weights) > 2**23
    if is_closed:
        engine.close()
    del engine
    gc.collect()
    assert sum(each.nbytes() for each in weights) == 0


def test_a_closed_engine_says_so() -> None:
    engine = LLMEngine(EngineConfig(kv_cache_tokens=64))
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate(STORY)


def test_configs_that_cannot_work_say_so() -> None:
    with pytest.raises(ConfigError, match="max_num_seqs must be at least 1"):
        EngineConfig(max_num_seqs=0)
    with pytest.raises(ConfigError, match="at most 4096"):
        LLMEngine(EngineConfig(max_model_len=5000))
    with pytest.raises(ConfigError, match="no CUDA device"):
        LLMEngine(EngineConfig(device="cuda"))
    with pytest.raises(ConfigError, match="cpu:abc"):
        LLMEngine(EngineConfig(device="cpu:abc"))
    with pytest.raises(ConfigError, match="lower it"):
        LLMEngine(EngineConfig(kv_cache_tokens=10**14))


def test_several_choices_are_those_of_their_seeds_and_share_the_prompt(engine: LLMEngine) -> None:
    prompt = STORY + " there was a fox" * 10
    options = {"max_tokens": 15, "temperature": 1.0, "ignore_eos": True, "cache_salt": "choices"}
    outputs = engine.generate([prompt, STORY], n=3, seed=2**64 - 2, **options)
    assert [output.choice_index for output in outputs] == [0, 1, 2, 0, 1, 2]
    assert [output.seed for output in outputs[:3]] == [2**64 - 2, 2**64 - 1, 0]
    num_prompt = len(outputs[0].prompt_token_ids)
    assert [output.num_cached_tokens for output in outputs[1:3]] == [num_prompt - 1] * 2
    for output in outputs[:3]:
        (alone,) = engine.generate(prompt, seed=output.seed, **options)
        assert alone.token_ids == output.token_ids
    assert len({tuple(output.token_ids) for output in outputs}) == 6


def test_more_choices_than_the_queue_holds_are_served(engine: LLMEngine) -> None:
    with LLMEngine(
        EngineConfig(max_num_seqs=2, max_queued_requests=3, kv_cache_tokens=2048)
    ) as small:
        outputs = small.generate([STORY] * 5, n=4, max_tokens=3, temperature=0.0)
    assert len(outputs) == 20
    assert len({output.text for output in outputs}) == 1


def test_cached_tokens_belong_to_a_salt(engine: LLMEngine) -> None:
    prompt = STORY + " and a king" * 12
    cached = [
        engine.generate(prompt, max_tokens=2, temperature=0.0, cache_salt=salt)[0].num_cached_tokens
        for salt in ("a", "a", "b", "")
    ]
    assert cached[0] == cached[2] == cached[3] == 0
    assert cached[1] % 16 == 0
    assert cached[1] >= 16


def test_priorities_of_prompts_decide_who_goes_first() -> None:
    with LLMEngine(EngineConfig(max_num_seqs=1, kv_cache_tokens=512)) as engine:
        ends: list[int] = []
        scheduler = engine._engine.scheduler
        finish_step = scheduler.finish_step

        def recording(*arguments: object) -> object:
            updates = finish_step(*arguments)  # type: ignore[arg-type]
            ends.extend(update.key.stream for update in updates if update.accounting)
            return updates

        scheduler.finish_step = recording  # type: ignore[method-assign, assignment]
        engine.generate(["a", "b", "c"], priority=[5, 0, -5], max_tokens=2, ignore_eos=True)
        assert ends == [2, 1, 0]
        with pytest.raises(ValueError, match="expected 2 priorities"):
            engine.generate(["a", "b"], priority=[1])


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"priority": 101}, "priority"),
        ({"priority": [0, "1"]}, "priority"),
        ({"priority": 1.5}, "priority"),
        ({"priority": "11"}, "priority"),
        ({"cache_salt": "x" * 129}, "cache_salt"),
        ({"cache_salt": None}, "cache_salt"),
    ],
)
def test_scheduling_options_are_checked(
    engine: LLMEngine, options: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        engine.generate(["a", "b"], max_tokens=1, **options)
    assert [each.field for each in refused.value.violations] == [field]
    with pytest.raises(InvalidRequestError):
        engine.chat([{"role": "user", "content": "a"}] * 2, max_tokens=1, priority=-101)
