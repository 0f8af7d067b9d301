"""Which tokens a sequence has seen, and how often: what penalties are computed from."""

from __future__ import annotations

import torch


class TokenCounts:
    """Counts of each token per slot, where a slot belongs to one running sequence.

    A slot's distinct ids are listed too, so that penalties and resets touch only those. The
    list's order means nothing.

    Attributes:
        counts: [max_slots, vocab_size] int32, twice the outputs, plus 1 if in the prompt.
        distinct_ids: [max_slots, max_distinct] int32; the ids whose count is not 0 come first.
        num_distinct: [max_slots] int32, how many those are.
    """

    def __init__(
        self, max_slots: int, vocab_size: int, max_distinct: int, device: torch.device | str
    ) -> None:
        """Allocates the counts, all 0.

        Args:
            max_slots: Sequences that run at a time.
            vocab_size: Width of the logits.
            max_distinct: Distinct ids that one slot may come to see: the longest sequence's
                length, or the size of the vocabulary, is enough. More would not be penalised.
            device: Where the logits are.
        """
        self.counts = torch.zeros(max_slots, vocab_size, dtype=torch.int32, device=device)
        self.distinct_ids = torch.zeros(max_slots, max_distinct, dtype=torch.int32, device=device)
        self.num_distinct = torch.zeros(max_slots, dtype=torch.int32, device=device)
