"""Qwen 3: Llama with a norm on each query and key head.

Source: Yang et al., "Qwen3 Technical Report", 2025.
"""

from __future__ import annotations

from mini_infer_engine.layers.attention import Attention
from mini_infer_engine.layers.backend import Backend
from mini_infer_engine.layers.decoder import CausalLM
from mini_infer_engine.layers.norm import RMSNorm
from mini_infer_engine.model_config import ModelConfig
from mini_infer_engine.models.llama import LlamaLayer


class Qwen3Layer(LlamaLayer):
    """One decoder layer."""

    def make_attention(self, config: ModelConfig, index: int, backend: Backend) -> Attention:
        """Attention with norms on its heads."""
        return Attention(config, index, backend, head_norm=RMSNorm)


class Qwen3ForCausalLM(CausalLM):
    """The whole model."""

    layer_class = Qwen3Layer
