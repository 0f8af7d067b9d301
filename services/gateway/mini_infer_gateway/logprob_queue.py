"""Log-probabilities of output that came from the engine and is not released yet."""

from __future__ import annotations

from collections import deque

from mini_infer.logprobs import LogprobColumns, joined


class LogprobQueue:
    """Log-probabilities of tokens in their order: rows come in, any number of tokens leaves.

    Rows are cut only where a release ends within them.
    """

    def __init__(self) -> None:
        """Is empty."""
        self._rows: deque[LogprobColumns] = deque()

    def put(self, row: LogprobColumns) -> None:
        """Adds those of tokens that follow."""
        if row.num_tokens:
            self._rows.append(row)

    def take(self, num_tokens: int) -> LogprobColumns | None:
        """Those of the next tokens, which must be there; None of no tokens."""
        taken = []
        while num_tokens > 0:
            row = self._rows.popleft()
            if row.num_tokens > num_tokens:
                self._rows.appendleft(row.part(num_tokens, row.num_tokens))
                row = row.part(0, num_tokens)
            taken.append(row)
            num_tokens -= row.num_tokens
        return joined(taken) if taken else None
