"""The model on a GPU: its steps are replayed as CUDA graphs where they can be.

Everything that differs from step to step is read from the device's memory (`paged_inputs.py`),
lengths included, so one graph for a number of rows serves all steps that decode alone. Of steps
with prompts the layers are captured without attention (`piecewise_layers.py`), up to a number of
tokens whose products outweigh the launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mini_infer_engine.cuda_graphs import GraphsBySize
from mini_infer_engine.graph_sizes import row_sizes
from mini_infer_engine.kv_cache import KVCache
from mini_infer_engine.layers.attention import AttentionInputs
from mini_infer_engine.layers.decoder import CausalLM
from mini_infer_engine.layers.paged_attention import PagedAttentionInputs
from mini_infer_engine.model_inputs import ModelInputs
from mini_infer_engine.model_runner import sampled_rows
from mini_infer_engine.paged_inputs import PagedInputBuffers
from mini_infer_engine.piecewise_layers import PiecewiseLayers


class GraphedForward:
    """The model's logits.

    Attributes:
        logits: [max_num_seqs, vocab_size] float32; those of a step stand in its first rows.
    """

    def __init__(
        self,
        model: CausalLM,
        buffers: PagedInputBuffers,
        max_num_seqs: int,
        vocab_size: int,
        token_sizes: Sequence[int],
    ) -> None:
        """Makes room for logits; every step runs operation by operation until `capture`.

        Args:
            model: Loaded, on a CUDA device.
            buffers: Make the inputs of every step.
            max_num_seqs: Rows of a step at most.
            vocab_size: Of the model.
            token_sizes: Numbers of tokens of steps with prompts that are captured.
        """
        self._model = model
        self._buffers = buffers
        self._token_sizes = token_sizes
        self._decode = GraphsBySize()
        self._layers = PiecewiseLayers(model)
        self.logits = torch.zeros(
            max_num_seqs, vocab_size, dtype=torch.float32, device=model.device
        )

    def __call__(self, inputs: ModelInputs[AttentionInputs]) -> torch.Tensor:
        """As `Forward.__call__`."""
        attention = inputs.attention
        assert isinstance(attention, PagedAttentionInputs)
        num_rows = attention.num_decodes
        if num_rows == len(inputs.token_ids) and self._decode.replay(num_rows):
            return self.logits[:num_rows]
        hidden = self._layers.run(attention)
        return self._run(inputs) if hidden is None else self._logits(hidden, inputs)

    @torch.inference_mode()
    def capture(self, cache: KVCache) -> None:
        """Captures every size of both kinds of steps.

        Args:
            cache: The whole cache; the graphs hold its place.
        """
        inputs: dict[int, ModelInputs[PagedAttentionInputs]] = {}
        for size in row_sizes(len(self.logits)):
            inputs[size] = self._buffers.padding_rows(size, cache)
            self._run(inputs[size])
            torch.cuda.synchronize()  # the next size's inputs take the place of this one's

        def run(size: int) -> None:
            self._run(inputs[size])

        self._decode.capture(list(inputs), run)
        self._layers.capture(self._buffers, cache, self._token_sizes)

    def release(self) -> None:
        """Gives the graphs' memory back; steps run operation by operation until `capture`."""
        self._decode.release()
        self._layers.release()
        torch.cuda.empty_cache()

    def _run(self, inputs: ModelInputs[AttentionInputs]) -> torch.Tensor:
        hidden = self._model(inputs.token_ids, inputs.cache, inputs.attention)
        return self._logits(hidden, inputs)

    def _logits(self, hidden: torch.Tensor, inputs: ModelInputs[AttentionInputs]) -> torch.Tensor:
        rows = sampled_rows(hidden, inputs)
        return self._model.logits(rows, out=self.logits[: len(rows)])
