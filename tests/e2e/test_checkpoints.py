"""Folders of every architecture and their kinds of tokenizer, served over real sockets."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from architectures.checkpoints import random_model
from architectures.fixed_configs import SMALL
from e2e.conftest import serving
from greedy_reference import GreedyComparison, GreedyReference
from mini_infer import AsyncClient
from tokenizer_kinds import KINDS
from transformers import PreTrainedTokenizerFast

NUM_TOKENS = 64
TOKENIZERS = {
    "LlamaForCausalLM": "llama_3",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen_2",
    "Qwen3ForCausalLM": "qwen_2",
    "Phi3ForCausalLM": "phi_3",
    "Gemma2ForCausalLM": "gemma",
    "Gemma3ForCausalLM": "gemma",
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
PROMPTS = [
    "Once upon a time",
    "狐は川のそばに住んでいました。 🦊👩‍👩‍👧",
    "The fox, the river and the rain. " * 8,
    [{"role": "user", "content": "Où est le renard ? "}],
]


def write_checkpoint(architecture: str, folder: Path) -> PreTrainedTokenizerFast:
    """A model of random weights and a tokenizer of as many ids, as `transformers` saves them."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[TOKENIZERS[architecture]](), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    config = SMALL[architecture]()
    config.vocab_size = len(tokenizer)
    model = random_model(config, seed=len(architecture))
    model.generation_config.eos_token_id = [1, 7]
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [architecture]
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TOKENIZERS)
def test_text_over_the_wire_is_what_transformers_says(architecture: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tokenizer = write_checkpoint(architecture, folder)
    reference = GreedyReference(folder)
    comparison = GreedyComparison(reference)

    async def check(address: str) -> None:
        async with AsyncClient(address) as client:
            streams = [
                client.generate(prompt, max_tokens=NUM_TOKENS, ignore_eos=True)
                for prompt in PROMPTS
            ]
            texts = await asyncio.gather(*(stream.text() for stream in streams))
            for prompt, stream, text in zip(PROMPTS, streams, texts, strict=True):
                if isinstance(prompt, str):
                    prompt_ids = tokenizer(prompt)["input_ids"]
                else:
                    prompt_ids = tokenizer.apply_chat_template(
                        prompt, add_generation_prompt=True, return_dict=False
                    )
                assert await client.tokenize(prompt) == prompt_ids
                assert stream.usage.num_prompt_tokens == len(prompt_ids)
                expected = reference.generate(prompt_ids, NUM_TOKENS)
                comparison.add(prompt_ids, expected, stream.token_ids)
                assert text == tokenizer.decode(stream.token_ids, skip_special_tokens=True)
            ended = client.generate(PROMPTS[0], max_tokens=NUM_TOKENS)
            await ended.text()
            first_end = next(
                (index for index, each in enumerate(streams[0].token_ids) if each in (1, 7)), None
            )
            if first_end is not None:
                assert ended.token_ids == streams[0].token_ids[: first_end + 1]
                assert ended.finish_reason == "stop"

    with serving(tmp_path / "stderr", "--model", str(folder)) as server:
        asyncio.run(check(server.address))
    comparison.check()
