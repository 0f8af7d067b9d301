"""What `transformers` computes for a text, position by position, the way `generate` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from greedy_reference import GreedyReference


@dataclass(frozen=True)
class Continuation:
    """A prompt, its greedy continuation, and the logits on the way.

    Attributes:
        prompt_ids: P ids.
        output_ids: N ids.
        logits: [P + N - 1, vocab_size], behind each token but the last.
    """

    prompt_ids: list[int]
    output_ids: list[int]
    logits: torch.Tensor


class StepwiseReference(GreedyReference):
    """A folder's model in `transformers`, with all logits on the way."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        config = self._model.config
        # Its cache of a window of n tokens keeps the last n - 1, which goes wrong for none; and
        # older releases feed the last token alone where longrope has to compute all of them anew.
        self._use_cache = (
            getattr(config, "sliding_window", None) != 1
            and config.rope_parameters.get("rope_type") != "longrope"
        )

    @torch.inference_mode()
    def continue_greedily(self, prompt_ids: Sequence[int], num_tokens: int) -> Continuation:
        """Prefills a prompt as a whole, then decodes token by token."""
        prompt = torch.tensor([list(prompt_ids)])
        self._forget_lengths()
        prefilled = self._model(prompt).logits[0]
        self._forget_lengths()
        output = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_tokens,
            use_cache=self._use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return Continuation(
            prompt_ids=list(prompt_ids),
            output_ids=output.sequences[0, len(prompt_ids) :].tolist(),
            logits=torch.cat((prefilled[:-1], *output.logits)),
        )

    def _forget_lengths(self) -> None:
        """A dynamic rotary embedding keeps the base of the longest text, until a short one."""
        self._model(torch.tensor([[0]]))


class Continuations:
    """Tells a greedy comparison the two best tokens of texts that were computed before."""

    def __init__(self) -> None:
        self._all: list[Continuation] = []

    def add(self, continuation: Continuation) -> None:
        """Admits questions about one more text."""
        self._all.append(continuation)

    def two_best(self, token_ids: Sequence[int]) -> tuple[tuple[int, int], float]:
        """Gives the two likeliest next tokens, and by how much their logits differ."""
        for each in reversed(self._all):
            text = [*each.prompt_ids, *each.output_ids]
            if text[: len(token_ids)] == list(token_ids):
                best = each.logits[len(token_ids) - 1].topk(2)
                first, second = best.indices.tolist()
                return (first, second), float(best.values[0] - best.values[1])
        raise LookupError(f"no text begins with {token_ids}")
