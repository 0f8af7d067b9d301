"""Which ids the masked rows of a step may choose: allowed ids, and what a language admits."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Seq

import numpy as np
from mini_infer_tokenizer.grammar import Matcher, fill_all

from mini_infer_engine.batch import TokenMasks
from mini_infer_engine.sequence import Sequence


def num_mask_words(vocab_size: int) -> int:
    """Words of 32 bits that hold a bit for each id."""
    return -(-vocab_size // 32)


def mask_of(token_ids: Collection[int], num_words: int) -> TokenMasks:
    """[words] with the bits of these ids set."""
    bits = np.zeros(num_words * 32, np.bool_)
    bits[list(token_ids)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def fill_masks(sequences: Seq[Sequence], num_words: int) -> TokenMasks:
    """The masks of sequences that are masked, in their order."""
    matchers: dict[int, Matcher] = {}
    only_choices: dict[int, int] = {}
    for row, sequence in enumerate(sequences):
        if sequence.grammar is None:
            continue
        only = sequence.grammar.only_choice()
        if only is None:
            matchers[row] = sequence.grammar.matcher
        else:
            only_choices[row] = only
    masks = np.full((len(sequences), num_words), -1, np.int32)
    fill_all(matchers, masks)
    for row, only in only_choices.items():
        masks[row] = mask_of([only], num_words)
    for row, sequence in enumerate(sequences):
        if sequence.allowed_mask is not None:
            masks[row] &= sequence.allowed_mask
    return masks
