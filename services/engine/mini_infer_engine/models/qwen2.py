"""Qwen 2 and 2.5: Llama with biases at query, key and value (`ModelConfig.qkv_bias`).

Source: Yang et al., "Qwen2 Technical Report", 2024.
"""

from __future__ import annotations

from mini_infer_engine.layers.decoder import CausalLM
from mini_infer_engine.models.llama import LlamaLayer


class Qwen2ForCausalLM(CausalLM):
    """The whole model."""

    layer_class = LlamaLayer
