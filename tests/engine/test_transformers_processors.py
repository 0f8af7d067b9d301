"""What a request's options make of the model's logits, against `transformers` on the demo model."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine.sampled_runs import logits_of
from engine.sampling_columns import columns_of, resolved
from greedy_reference import NEAR_TIE, GreedyComparison, GreedyReference
from mini_infer import EngineConfig, LLMEngine
from mini_infer.config import bundled_model
from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer_engine.batch import fill_no_masks
from mini_infer_engine.sampling import Sampler
from mini_infer_engine.token_choice import EagerChoice
from mini_infer_engine.token_masks import mask_of, num_mask_words
from mini_infer_kernels.reference.sampling import restricted_scores
from mini_infer_kernels.sampling_kernels import REFERENCE_SAMPLING
from mini_infer_tokenizer.bad_words import bad_word_sequences
from transformers import LogitsProcessorList
from transformers.generation import logits_process as processors

VOCAB = 4096
EOS = [0, 5]
STORY = "Once upon a time"
NUM_TOKENS = 24
NUM_TEXTS = 12
ROUNDING = 2e-5
"""Probability that sums in float32 may put on the other side of a bound."""


@pytest.fixture(scope="module")
def reference() -> GreedyReference:
    return GreedyReference(bundled_model("demo"))


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    """Steps of 32 tokens, so that prompts take several."""
    config = EngineConfig(
        max_num_seqs=8, kv_cache_tokens=4096, max_model_len=512, max_num_batched_tokens=32
    )
    with LLMEngine(config) as made:
        yield made


@pytest.fixture(scope="module")
def texts(reference: GreedyReference) -> list[tuple[list[int], list[int], torch.Tensor]]:
    """Prompts, outputs of any ids behind them, and the [1, vocab_size] logits behind both."""
    generator = random.Random(5)
    made = []
    for _ in range(NUM_TEXTS):
        ids = [generator.randrange(6, 60 * 10 ** generator.randrange(2)) for _ in range(30)]
        num_prompt = generator.randrange(3, 28)
        logits = logits_of(reference, ids)[-1:]
        made.append((ids[:num_prompt], ids[num_prompt:], logits))
    return made


def new_sampler(max_num_seqs: int = 1) -> Sampler:
    return Sampler(
        REFERENCE_SAMPLING,
        vocab_size=VOCAB,
        max_num_seqs=max_num_seqs,
        max_model_len=512,
        device=torch.device("cpu"),
    )


def changed(
    logits: torch.Tensor, sampling: ResolvedSampling, prompt: Seq[int], output: Seq[int]
) -> torch.Tensor:
    """The logits after biases, bans and penalties, as our sampler makes them."""
    columns = columns_of([sampling], prompt=prompt, outputs=[output], end_ids=EOS)
    ours = logits.clone()
    new_sampler()._change(ours, columns)
    return ours


# --- logits -------------------------------------------------------------------------------------


def conditions(
    generator: random.Random, prompt: Seq[int], output: Seq[int]
) -> tuple[dict[str, Any], list[Any]]:
    """Random options that change logits, and the processors of `transformers` that do the same."""
    text = [*prompt, *output]
    penalty = generator.choice([0.01, 0.8, 1.0, 1.3, 100.0])
    biased = generator.sample(range(VOCAB), 20) + text[-2:]
    bias = {each: generator.uniform(-100, 100) for each in biased}
    bad_words = [[generator.randrange(VOCAB)], [text[-1]]]  # single ones
    for length in range(1, 5):  # words that have begun, some of them in the prompt
        bad_words.append([*text[-length:], generator.randrange(VOCAB)])
    bad_words.append([*text, 9])  # begun with the prompt
    bad_words.append([*text[:-1], text[-1] + 1, 11])  # not begun
    bad_words.append([7, *text, 12])  # longer than the text
    min_tokens = generator.choice([len(output), len(output) + 1])
    stop_ids = generator.sample(range(6, VOCAB), 2)
    options = {
        "repetition_penalty": penalty,
        "bias_ids": list(bias),
        "bias_values": list(bias.values()),
        "bad_words": bad_words,
        "min_tokens": min_tokens,
        "stop_token_ids": stop_ids,
    }
    theirs = [
        processors.SequenceBiasLogitsProcessor({(each,): value for each, value in bias.items()}),
        processors.NoBadWordsLogitsProcessor(bad_words),
        processors.MinNewTokensLengthLogitsProcessor(len(prompt), min_tokens, [*EOS, *stop_ids]),
        processors.RepetitionPenaltyLogitsProcessor(penalty),
    ]
    return options, theirs


@pytest.mark.parametrize("seed", range(4))
def test_changed_logits_are_those_of_the_processors(
    texts: list[tuple[list[int], list[int], torch.Tensor]], seed: int
) -> None:
    generator = random.Random(seed)
    for prompt, output, logits in texts:
        options, theirs = conditions(generator, prompt, output)
        expected = logits.clone()
        for processor in theirs:
            expected = processor(torch.tensor([[*prompt, *output]]), expected)
        ours = changed(logits, resolved(**options), prompt, output)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-5)


def test_presence_and_frequency_follow_their_formula_after_repetition(
    texts: list[tuple[list[int], list[int], torch.Tensor]],
) -> None:
    for index, (prompt, output, logits) in enumerate(texts):
        output = [*output, *output[:3], *prompt[:2]]
        repetition, presence, frequency = 1.0 + index % 2, index / 3 - 2, 2 - index / 4
        expected = logits[0].double().numpy().copy()
        for token_id in {*prompt, *output}:
            score = expected[token_id]
            score = score / repetition if score > 0 else score * repetition
            count = output.count(token_id)
            expected[token_id] = score - frequency * count - presence * (count > 0)
        sampling = resolved(
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
        )
        ours = changed(logits, sampling, prompt, output)[0].double().numpy()
        assert np.abs(ours - expected).max() < 1e-5


RESTRICTIONS = [
    {"top_k": 1},
    {"top_k": 50, "temperature": 0.7},
    {"top_p": 0.1, "temperature": 2.0},
    {"top_p": 0.95, "temperature": 0.7},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"typical_p": 0.2, "temperature": 1.5},
    {"typical_p": 0.9},
    {"min_p": 0.001, "top_k": 40, "top_p": 0.9, "typical_p": 0.8, "temperature": 3.0},
    {"top_k": 4000, "top_p": 0.999, "temperature": 100.0},
]


def warped(logits: torch.Tensor, restriction: dict[str, Any]) -> torch.Tensor:
    """[1, vocab_size] -inf for tokens that the warpers drop, in the order that ours has."""
    theirs: list[Any] = [processors.TemperatureLogitsWarper(restriction.get("temperature", 1.0))]
    if "min_p" in restriction:
        theirs.append(processors.MinPLogitsWarper(restriction["min_p"]))
    if "top_k" in restriction:
        theirs.append(processors.TopKLogitsWarper(restriction["top_k"]))
    if "top_p" in restriction:
        theirs.append(processors.TopPLogitsWarper(restriction["top_p"]))
    if "typical_p" in restriction:
        theirs.append(processors.TypicalLogitsWarper(restriction["typical_p"]))
    return LogitsProcessorList(theirs)(torch.zeros(1, 1, dtype=torch.long), logits)


@pytest.mark.parametrize("restriction", RESTRICTIONS, ids=str)
def test_restricted_sets_are_those_of_the_warpers(
    texts: list[tuple[list[int], list[int], torch.Tensor]], restriction: dict[str, Any]
) -> None:
    for _, _, logits in texts:
        columns = columns_of([resolved(**restriction)])
        controls = EagerChoice(REFERENCE_SAMPLING, torch.device("cpu")).controls(
            columns, fill_no_masks
        )
        ours = restricted_scores(logits, controls, torch.tensor([0])).isfinite()
        theirs = warped(logits, restriction).isfinite()
        divided = logits.double() / restriction.get("temperature", 1.0)
        differing = divided.softmax(-1)[ours != theirs].sum()
        assert differing < ROUNDING


@pytest.mark.parametrize("restriction", RESTRICTIONS[:-1], ids=str)
def test_draws_come_from_the_warpers_sets(
    texts: list[tuple[list[int], list[int], torch.Tensor]], restriction: dict[str, Any]
) -> None:
    num_draws = 200
    rows = [resolved(seed=seed, **restriction) for seed in range(num_draws)]
    for _, _, logits in texts[:3]:
        repeated = logits.repeat(num_draws, 1)
        tokens = new_sampler(num_draws).launch(repeated, columns_of(rows), fill_no_masks)()
        scores = warped(logits, restriction)[0]
        assert scores[torch.from_numpy(tokens.token_ids[:, 0])].isfinite().all()
        # All that are likely enough to come among so many.
        likely = (scores.softmax(-1) > 0.08).nonzero().flatten().tolist()
        assert set(likely) <= set(tokens.token_ids[:, 0].tolist())


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_allowed_ids_suppress_all_others(
    texts: list[tuple[list[int], list[int], torch.Tensor]], temperature: float
) -> None:
    generator = random.Random(8)
    allowed = [generator.sample(range(VOCAB), 1 + 7 * index) for index in range(NUM_TEXTS)]
    logits = torch.cat([each for _, _, each in texts])
    rows = [resolved(seed=seed, temperature=temperature) for seed in range(NUM_TEXTS)]
    columns = replace(columns_of(rows), masked=np.arange(NUM_TEXTS))
    masks = np.stack([mask_of(each, num_mask_words(VOCAB)) for each in allowed])
    tokens = new_sampler(NUM_TEXTS).launch(logits.clone(), columns, lambda: masks)()
    for row, ids in enumerate(allowed):
        suppress = processors.SuppressTokensLogitsProcessor(complement(ids))
        scores = suppress(torch.zeros(1, 1, dtype=torch.long), logits[row : row + 1])[0]
        chosen = int(tokens.token_ids[row, 0])
        assert scores[chosen].isfinite()
        if temperature == 0:
            assert chosen == scores.argmax()


def complement(token_ids: Collection[int]) -> list[int]:
    return sorted({*range(VOCAB)}.difference(token_ids))


# --- greedy generation --------------------------------------------------------------------------


class ProcessedGreedy:
    """Greedy decoding by `transformers` with processors, and with more ids that end it."""

    def __init__(
        self, reference: GreedyReference, theirs: Seq[Any], stop_ids: Seq[int] = ()
    ) -> None:
        self._reference = reference
        self._end_ids = [*EOS, *stop_ids]
        self._processors = LogitsProcessorList(theirs)

    @torch.inference_mode()
    def generate(self, prompt_ids: Seq[int]) -> list[int]:
        input_ids = torch.tensor([list(prompt_ids)])
        output = self._reference._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=NUM_TOKENS,
            eos_token_id=self._end_ids,
            pad_token_id=0,
            logits_processor=self._processors,
        )
        output_ids: list[int] = output[0, len(prompt_ids) :].tolist()
        return output_ids

    def two_best(self, token_ids: Seq[int]) -> tuple[tuple[int, int], float]:
        logits = logits_of(self._reference, token_ids)[-1:]
        scores = self._processors(torch.tensor([list(token_ids)]), logits)[0]
        best = scores.topk(2)
        first, second = best.indices.tolist()
        return (first, second), float(best.values[0] - best.values[1])


PROMPTS = [
    STORY,
    "The fox said to the crow",
    "Once upon a time there was an old man who lived near the sea and had three daughters. " * 3,
]


@pytest.mark.parametrize("name", ["penalty", "bias", "bad words", "min_tokens", "allowed", "all"])
def test_greedy_outputs_are_those_of_generate(
    engine: LLMEngine, reference: GreedyReference, name: str
) -> None:
    """Bad words are parts of what the model would say, so that it meets them."""
    free = engine.generate(PROMPTS, temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    num_tokens, num_changed = 0, 0
    for prompt, plain in zip(PROMPTS, free, strict=True):
        options, theirs = option_of(name, engine, plain.prompt_token_ids, plain.token_ids)
        (ours,) = engine.generate(prompt, temperature=0, max_tokens=NUM_TOKENS, **options)
        assert ours.error is None
        num_changed += ours.token_ids != plain.token_ids
        judge = ProcessedGreedy(reference, theirs, options.get("stop_token_ids", ()))
        comparison = GreedyComparison(judge)
        expected = judge.generate(plain.prompt_token_ids)
        comparison.add(plain.prompt_token_ids, expected, ours.token_ids)
        comparison.check()
        num_tokens += comparison.num_tokens
    assert num_tokens > 2 * NUM_TOKENS
    assert num_changed >= 2, "the option changes nothing"


def option_of(
    name: str, engine: LLMEngine, prompt_ids: Seq[int], free_ids: Seq[int]
) -> tuple[dict[str, Any], list[Any]]:
    """An option, and what does the same in `transformers`."""
    decode = engine._tokenizer.decode
    words = [decode(free_ids[4:5], False), decode(free_ids[7:10], False)]
    # Its first token is the last one of the prompt.
    words.append(decode([prompt_ids[-1], *free_ids[:1]], False))
    bias = {free_ids[0]: -3.0, free_ids[3]: -100.0, 900: 2.5}
    end_id = free_ids[2]
    allowed = sorted({*free_ids, *range(300, 900)} - {free_ids[1], free_ids[5]})
    each: dict[str, tuple[dict[str, Any], Any]] = {
        "bias": (
            {"logit_bias": bias},
            processors.SequenceBiasLogitsProcessor({(key,): bias[key] for key in bias}),
        ),
        "bad words": (
            {"bad_words": words},
            processors.NoBadWordsLogitsProcessor(bad_word_sequences(engine._tokenizer, words)),
        ),
        "min_tokens": (
            {"min_tokens": 12, "stop_token_ids": [end_id]},
            processors.MinNewTokensLengthLogitsProcessor(len(prompt_ids), 12, [*EOS, end_id]),
        ),
        "penalty": (
            {"repetition_penalty": 2.0},
            processors.RepetitionPenaltyLogitsProcessor(2.0),
        ),
        "allowed": (
            {"allowed_token_ids": allowed},
            processors.SuppressTokensLogitsProcessor(complement(allowed)),
        ),
    }
    chosen = list(each.values()) if name == "all" else [each[name]]
    options: dict[str, Any] = {}
    for option, _ in chosen:
        options |= option
    return options, [processor for _, processor in chosen]


def test_greedy_outputs_with_presence_and_frequency_follow_the_formula(
    engine: LLMEngine, reference: GreedyReference
) -> None:
    presence, frequency = 2.0, 2.0
    outputs = engine.generate(
        PROMPTS,
        temperature=0,
        max_tokens=3 * NUM_TOKENS,
        ignore_eos=True,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    num_changed = 0
    for output in outputs:
        prompt_ids, output_ids = output.prompt_token_ids, output.token_ids
        logits = logits_of(reference, [*prompt_ids, *output_ids])[len(prompt_ids) - 1 :]
        for position, token_id in enumerate(output_ids):
            scores = logits[position].double().numpy().copy()
            num_changed += int(scores.argmax() != token_id)
            counts = np.bincount(output_ids[:position], minlength=VOCAB)
            scores -= frequency * counts + presence * (counts > 0)
            assert scores.max() - scores[token_id] <= NEAR_TIE
    assert num_changed > 5
