"""The model on a GPU: the layers of steps that decode alone are replayed as CUDA graphs.

Everything that differs from step to step is read from the device's memory (`paged_inputs.py`),
lengths included, so one graph for a number of rows serves all of them. Steps with prompts in them
run operation by operation: their products outweigh the launches.
"""

from __future__ import annotations

import torch

from mini_infer_engine.cuda_graphs import GraphsBySize
from mini_infer_engine.graph_sizes import graph_sizes
from mini_infer_engine.kv_cache import KVCache
from mini_infer_engine.layers.attention import AttentionInputs
from mini_infer_engine.layers.decoder import CausalLM
from mini_infer_engine.model_inputs import ModelInputs
from mini_infer_engine.model_runner import sampled_rows
from mini_infer_engine.paged_inputs import PagedInputBuffers


class GraphedForward:
    """The model's logits.

    Attributes:
        logits: [max_num_seqs, vocab_size] float32; those of a step stand in its first rows.
    """

    def __init__(
        self, model: CausalLM, buffers: PagedInputBuffers, max_num_seqs: int, vocab_size: int
    ) -> None:
        """Makes room for logits; every step runs operation by operation until `capture`.

        Args:
            model: Loaded, on a CUDA device.
            buffers: Make the inputs of every step.
            max_num_seqs: Rows of a step at most.
            vocab_size: Of the model.
        """
        self._model = model
        self._buffers = buffers
        self._graphs: GraphsBySize | None = None
        self.logits = torch.zeros(
            max_num_seqs, vocab_size, dtype=torch.float32, device=model.device
        )

    def __call__(self, inputs: ModelInputs[AttentionInputs]) -> torch.Tensor:
        """As `Forward.__call__`."""
        if inputs.sampled_tokens is not None or self._graphs is None:
            return self._run(inputs)
        num_rows = len(inputs.token_ids)
        self._graphs.run(num_rows)
        return self.logits[:num_rows]

    def capture(self, cache: KVCache) -> None:
        """Captures steps that decode alone, of every size.

        Args:
            cache: The whole cache; the graphs hold its place. What the inputs name is written.
        """
        inputs = {
            size: self._buffers.decode_inputs(size, cache) for size in graph_sizes(len(self.logits))
        }

        def run(size: int) -> None:
            self._run(inputs[size])

        self._graphs = GraphsBySize(run)
        self._graphs.capture(list(inputs))

    def _run(self, inputs: ModelInputs[AttentionInputs]) -> torch.Tensor:
        hidden = self._model(inputs.token_ids, inputs.cache, inputs.attention)
        rows = sampled_rows(hidden, inputs)
        return self._model.logits(rows, out=self.logits[: len(rows)])
