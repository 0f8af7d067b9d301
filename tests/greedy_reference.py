"""Comparing greedy token ids with those of `transformers`, near-ties included.

Two correct implementations add numbers in different orders, so their logits differ in the last
bits, and where the reference's two best logits almost tie either token is right. Then the texts
part for good, so only the tokens up to the first difference are compared. Near-ties are counted:
more than a few mean that the comparison is worth nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

NEAR_TIE = 1e-4
"""Distance of the reference's two best logits within which either token is admitted."""
TOKENS_PER_NEAR_TIE = 10_000
"""At most one near-tie for each so many tokens, begun ones included."""


class GreedyReference:
    """Greedy decoding of a model folder by `transformers`, in float32, one prompt at a time."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig

        # The one way of computing attention that knows soft caps.
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        # The folder's own settings sample and stop at its end ids; this one does neither.
        self._model.generation_config = GenerationConfig(do_sample=False)  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def generate(self, prompt_ids: Sequence[int], num_tokens: int) -> list[int]:
        """Chooses so many tokens after a prompt; end ids are ordinary tokens."""
        input_ids = torch.tensor([list(prompt_ids)])
        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=num_tokens,
        )
        output_ids: list[int] = output[0, len(prompt_ids) :].tolist()
        return output_ids

    @torch.inference_mode()
    def two_best(self, token_ids: Sequence[int]) -> tuple[tuple[int, int], float]:
        """Gives the two likeliest next tokens, and by how much their logits differ."""
        logits = self._model(torch.tensor([list(token_ids)])).logits[0, -1]
        best = logits.topk(2)
        first, second = best.indices.tolist()
        return (first, second), float(best.values[0] - best.values[1])


class TellsTwoBest(Protocol):
    """What a comparison asks of its reference."""

    def two_best(self, token_ids: Sequence[int]) -> tuple[tuple[int, int], float]:
        """Gives the two likeliest next tokens, and by how much their logits differ."""


class GreedyComparison:
    """Compares greedy outputs with a reference's, and counts the near-ties among them."""

    def __init__(self, reference: TellsTwoBest) -> None:
        self._reference = reference
        self.num_tokens = 0
        self.near_ties: list[str] = []

    def add(self, prompt_ids: Sequence[int], expected: Sequence[int], given: Sequence[int]) -> bool:
        """Compares one output.

        Args:
            prompt_ids: What both continue.
            expected: Ids of the reference.
            given: Ids to judge; as many, unless they part.

        Returns:
            Whether they are equal; False where they part at a near-tie.

        Raises:
            AssertionError: They differ where the reference has one clear best token.
        """
        pairs = enumerate(zip(expected, given, strict=False))
        position = next((index for index, (one, other) in pairs if one != other), None)
        if position is None:
            assert len(given) == len(expected)
            self.num_tokens += len(expected)
            return True
        self.num_tokens += position + 1
        two_best, gap = self._reference.two_best([*prompt_ids, *expected[:position]])
        where = f"output position {position}: {expected[position]} or {given[position]}, gap {gap}"
        assert {expected[position], given[position]} == set(two_best), where
        assert gap <= NEAR_TIE, where
        self.near_ties.append(where)
        return False

    def check(self) -> None:
        """Asserts that near-ties were rare."""
        allowed = -(-self.num_tokens // TOKENS_PER_NEAR_TIE)
        assert len(self.near_ties) <= allowed, (self.num_tokens, self.near_ties)
