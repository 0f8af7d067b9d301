"""The corpus: which documents are training text and which are held out, and their token ids.

Every document is a function of (seed, split, index) alone, so the training text can be produced
again at any time, in any order and by several processes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import numpy.typing as npt
from dialogue import Document, generate_document
from tokenizers import Tokenizer

CORPUS_SEED = 1
NUM_TRAINING_DOCUMENTS = 600_000
NUM_HELD_OUT_DOCUMENTS = 4_000
_CHUNK_DOCUMENTS = 10_000


@dataclass(frozen=True, slots=True)
class TokenStream:
    """Encoded documents, one after another."""

    token_ids: npt.NDArray[np.uint16]
    """`[num_tokens]`."""
    document_starts: npt.NDArray[np.int64]
    """`[num_documents]`, place of each document's first token."""


def document_at(index: int, *, held_out: bool = False) -> Document:
    """Returns the document number `index` of a split."""
    split = "held-out" if held_out else "training"
    return generate_document(random.Random(f"{CORPUS_SEED}:{split}:{index}"), held_out=held_out)


def document_texts(start: int, stop: int, *, held_out: bool = False) -> list[str]:
    """Returns the texts of documents `start` to `stop - 1` of a split."""
    return [document_at(index, held_out=held_out).text() for index in range(start, stop)]


def iterate_chunks(num_documents: int) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of the chunks that worker processes take."""
    for start in range(0, num_documents, _CHUNK_DOCUMENTS):
        yield start, min(start + _CHUNK_DOCUMENTS, num_documents)


def _encode_chunk(chunk: tuple[int, int], tokenizer_json: str, held_out: bool) -> TokenStream:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    texts = document_texts(*chunk, held_out=held_out)
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    rows = [np.array(encoding.ids, dtype=np.uint16) for encoding in encodings]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return TokenStream(np.concatenate(rows), np.cumsum(lengths) - lengths)


def encode_corpus(
    tokenizer: Tokenizer, num_documents: int, num_processes: int, *, held_out: bool = False
) -> TokenStream:
    """Generates and encodes the first `num_documents` documents of a split.

    Args:
        tokenizer: The tokenizer of the models.
        num_documents: How many documents.
        num_processes: How many processes share the work.
        held_out: Which split.

    Returns:
        The encoded documents in order; the same for every `num_processes`.
    """
    chunks = list(iterate_chunks(num_documents))
    with ProcessPoolExecutor(num_processes) as pool:
        parts = list(pool.map(_encode_chunk, chunks, repeat(tokenizer.to_str()), repeat(held_out)))
    offsets = np.cumsum([0, *(len(part.token_ids) for part in parts)])
    starts = [part.document_starts + offset for part, offset in zip(parts, offsets, strict=False)]
    token_ids = np.concatenate([part.token_ids for part in parts])
    return TokenStream(token_ids, np.concatenate(starts))
