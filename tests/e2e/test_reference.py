"""What clients get over real sockets is what `transformers` and the in-process engine compute."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from greedy_reference import GreedyComparison, GreedyReference
from mini_infer import AsyncClient, EngineConfig, LLMEngine
from mini_infer.config import bundled_model
from mini_infer_engine.model_config import read_model_config
from tokenizers import Tokenizer

NUM_TOKENS = 64
NUM_STREAMS = 32
PROMPTS = [
    "Once upon a time",
    "Once upon a time there was a fox",
    "One morning a small rabbit found a key",
    "A king lived in a castle by the sea.",
    "The dragon was sad because",
    "Lily and Tom went to the forest.",
    "In the village there was a baker who",
    "It was raining, and the owl",
    "Tell me a story about a wizard.",
    "Tell me a story about a hedgehog and a red kite.",
    "Mia had lost her lantern.",
    "Who found the golden bell?",
    "Why was the bear angry?",
    "The end",
    "Pip",
    "a",
    'The sailor looked at the sky and said: "',
    "1, 2, 3",
    "Äpfel, наука, 物語 🦊",
    "The old bridge was broken, so the goat and the sheep could not go home. " * 4,
]


@dataclass(frozen=True)
class Stream:
    """What a client received."""

    token_ids: list[int]
    text: str
    finish_reason: str | None


@pytest.fixture(scope="module")
def reference() -> GreedyReference:
    return GreedyReference(bundled_model("demo"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(bundled_model("demo") / "tokenizer.json"))


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    with LLMEngine(EngineConfig(kv_cache_tokens=8192)) as made:
        yield made


async def stream_all(address: str, prompts: Sequence[str], *, ignore_eos: bool) -> list[Stream]:
    """Sends all requests at once and reads every stream to its end."""
    async with AsyncClient(address) as client:

        async def one(prompt: str) -> Stream:
            stream = client.generate(
                prompt, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=ignore_eos
            )
            text = await stream.text()
            return Stream(stream.token_ids, text, stream.finish_reason)

        return await asyncio.gather(*map(one, prompts))


def test_concurrent_streams_equal_transformers_and_the_engine_in_process(
    server: str, engine: LLMEngine, reference: GreedyReference, tokenizer: Tokenizer
) -> None:
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(NUM_STREAMS)]
    streams = asyncio.run(stream_all(server, prompts, ignore_eos=True))
    prompt_ids = {prompt: tokenizer.encode(prompt).ids for prompt in PROMPTS}
    expected = {prompt: reference.generate(prompt_ids[prompt], NUM_TOKENS) for prompt in PROMPTS}
    in_process = engine.generate(PROMPTS, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)

    comparison = GreedyComparison(reference)
    for prompt, stream in zip(prompts, streams, strict=True):
        assert stream.finish_reason == "length"
        assert stream.text == tokenizer.decode(stream.token_ids)
        if comparison.add(prompt_ids[prompt], expected[prompt], stream.token_ids):
            assert stream.text == tokenizer.decode(expected[prompt])
    by_prompt = dict(zip(prompts, streams, strict=True))
    for prompt, output in zip(PROMPTS, in_process, strict=True):
        stream = by_prompt[prompt]
        assert output.prompt_token_ids == prompt_ids[prompt]
        if comparison.add(prompt_ids[prompt], output.token_ids, stream.token_ids):
            assert output.text == stream.text
            assert output.finish_reason == stream.finish_reason
    comparison.check()
    assert comparison.num_tokens >= NUM_STREAMS * NUM_TOKENS


def test_streams_end_where_the_reference_first_chooses_an_end_id(
    server: str, engine: LLMEngine, reference: GreedyReference, tokenizer: Tokenizer
) -> None:
    eos_token_ids = read_model_config(bundled_model("demo")).eos_token_ids
    streams = asyncio.run(stream_all(server, PROMPTS, ignore_eos=False))
    comparison = GreedyComparison(reference)
    for prompt, stream in zip(PROMPTS, streams, strict=True):
        prompt_ids = tokenizer.encode(prompt).ids
        expected = reference.generate(prompt_ids, NUM_TOKENS)
        ends = [index for index, each in enumerate(expected) if each in eos_token_ids]
        if ends:
            expected = expected[: ends[0] + 1]
        if comparison.add(prompt_ids, expected, stream.token_ids):
            assert stream.finish_reason == ("stop" if ends else "length")
    comparison.check()
