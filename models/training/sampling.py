"""Samples answers from a model for evaluation, many prompts at once."""

from __future__ import annotations

import torch
from llama import Llama
from special_tokens import END_OF_TEXT_ID, EOS_IDS
from tokenizers import Tokenizer
from torch import Tensor


def draw_tokens(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Draws one token per row; temperature 0 takes the most likely one.

    Args:
        logits: `[batch, vocab_size]`.
        temperature: Divides the logits.
        generator: Source of the random numbers.

    Returns:
        `[batch]`, int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


@torch.inference_mode()
def sample_stories(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: list[str],
    *,
    temperature: float,
    seed: int,
    max_tokens: int = 400,
) -> list[str]:
    """Samples one answer for each prompt.

    All sequences advance together, one token a step: where a prompt still has tokens they are fed
    in, after it the drawn ones; so every row is at the same position and no padding is needed.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: Texts with their special tokens written out.
        temperature: Divides the logits; 0 is greedy.
        seed: Seed of the random numbers.
        max_tokens: Length at which a sequence ends, its prompt included.

    Returns:
        The answers as text, without special tokens; an unended answer is cut at `max_tokens`.
    """
    prompt_ids = [row.ids for row in tokenizer.encode_batch(prompts, add_special_tokens=False)]
    sequences = torch.full((len(prompts), max_tokens), END_OF_TEXT_ID)
    for row, ids in zip(sequences, prompt_ids, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    lengths = torch.tensor([len(ids) for ids in prompt_ids])
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    caches = model.new_caches(len(prompts), max_tokens)
    for position in range(max_tokens - 1):
        logits = model(sequences[:, position : position + 1], caches, position)[:, -1]
        drawn = draw_tokens(logits, temperature, generator)
        is_drawing = (position + 1 >= lengths) & ~ended
        sequences[is_drawing, position + 1] = drawn[is_drawing]
        ended |= is_drawing & torch.isin(drawn, torch.tensor(EOS_IDS))
        if ended.all():
            break
    answers = [row[length:].tolist() for row, length in zip(sequences, lengths, strict=True)]
    return tokenizer.decode_batch(answers, skip_special_tokens=True)
