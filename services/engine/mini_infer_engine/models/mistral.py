"""Mistral: Llama with a sliding window, which config.json gives.

Source: Jiang et al., "Mistral 7B", 2023.
"""

from __future__ import annotations

from mini_infer_engine.layers.decoder import CausalLM
from mini_infer_engine.models.llama import LlamaLayer


class MistralForCausalLM(CausalLM):
    """The whole model."""

    layer_class = LlamaLayer
