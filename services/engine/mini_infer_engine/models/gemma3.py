"""Gemma 3, text: Gemma 2 with a norm on each query and key head.

Its scores have no soft cap, and sliding and full layers have rotary embeddings of their own.

Source: Gemma Team, "Gemma 3 Technical Report", 2025.
"""

from __future__ import annotations

from mini_infer_engine.layers.attention import Attention
from mini_infer_engine.layers.backend import Backend
from mini_infer_engine.layers.norm import GemmaRMSNorm
from mini_infer_engine.model_config import ModelConfig
from mini_infer_engine.models.gemma2 import Gemma2ForCausalLM, Gemma2Layer


class Gemma3Layer(Gemma2Layer):
    """One decoder layer."""

    def make_attention(self, config: ModelConfig, index: int, backend: Backend) -> Attention:
        """Attention with norms on its heads."""
        return Attention(config, index, backend, head_norm=GemmaRMSNorm)


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """The whole model."""

    layer_class = Gemma3Layer
