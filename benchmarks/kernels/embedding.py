"""The gather of embeddings, scaled as in Gemma, against torch and the memory limit."""

from __future__ import annotations

import torch
from against_torch import NUM_ROWS, add_case, print_table, random
from harness import SHAPES, Report, parse_options
from mini_infer_kernels.embedding import triton_embedding
from torch.nn import functional


def torch_embedding(
    token_ids: torch.Tensor, weight: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """The gather as models write it."""
    rows = functional.embedding(token_ids, weight)
    return rows if scale is None else rows * scale


def main() -> None:
    """Measures all sizes; the ids in random order, so that rows are read from all over a table."""
    options = parse_options(__doc__ or "")
    report = Report("embedding")
    for name in options.shape:
        vocab_size, hidden = SHAPES[name]["vocab_size"], SHAPES[name]["hidden_size"]
        weight = random(vocab_size, hidden)
        for scale in (None, hidden**0.5):
            for rows in NUM_ROWS:
                add_case(
                    report,
                    triton_embedding,
                    torch_embedding,
                    lambda rows=rows, weight=weight, scale=scale: (
                        torch.randint(len(weight), (rows,), dtype=torch.int32, device="cuda"),
                        weight,
                        scale,
                    ),
                    4 * rows * hidden,
                    op="embedding",
                    shape=name,
                    rows=rows,
                    scaled=scale is not None,
                )
    print_table(report)
    report.write()


if __name__ == "__main__":
    main()
