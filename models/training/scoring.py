"""Scores a model on held-out documents: its perplexity and its greedy choices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from corpus import TokenStream
from llama import Llama
from torch.nn import functional

BATCH_DOCUMENTS = 32


@dataclass(frozen=True, slots=True)
class Scores:
    """How a model did on the tokens of a stream, each document read from its own start."""

    losses: npt.NDArray[np.float32]
    """`[num_scored_tokens]`, negative log-likelihood in nats; first tokens are not scored."""
    greedy_ids: npt.NDArray[np.int64]
    """`[num_scored_tokens]`, the token that the model found most likely."""

    @property
    def perplexity(self) -> float:
        """Returns exp of the mean loss."""
        return math.exp(float(self.losses.mean()))


def _batches(stream: TokenStream) -> list[list[npt.NDArray[np.int64]]]:
    """Groups documents of similar length, so that little padding is computed."""
    documents = np.split(stream.token_ids.astype(np.int64), stream.document_starts[1:])
    documents.sort(key=len)
    return [
        documents[start : start + BATCH_DOCUMENTS]
        for start in range(0, len(documents), BATCH_DOCUMENTS)
    ]


@torch.inference_mode()
def score_stream(model: Llama, stream: TokenStream) -> Scores:
    """Scores every document of `stream` by itself, in fp32 on the model's device."""
    device = model.model.embed_tokens.weight.device
    losses, greedy_ids = [], []
    for documents in _batches(stream):
        lengths = torch.tensor([len(document) for document in documents])
        rows = [torch.from_numpy(document) for document in documents]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        logits = model(padded[:, :-1]).float()
        loss = functional.cross_entropy(logits.transpose(1, 2), padded[:, 1:], reduction="none")
        is_scored = torch.arange(1, padded.shape[1]) < lengths[:, None]
        losses.append(loss.cpu()[is_scored].numpy())
        greedy_ids.append(logits.argmax(-1).cpu()[is_scored].numpy())
    return Scores(np.concatenate(losses), np.concatenate(greedy_ids))
