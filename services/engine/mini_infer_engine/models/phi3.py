"""Phi-3 and Phi-4: Llama whose checkpoints hold fused projections; perhaps part of a head turns.

Source: Abdin et al., "Phi-3 Technical Report", 2024.
"""

from __future__ import annotations

from mini_infer_engine.layers.attention import Attention
from mini_infer_engine.layers.backend import Backend
from mini_infer_engine.layers.decoder import CausalLM
from mini_infer_engine.layers.feed_forward import FeedForward
from mini_infer_engine.model_config import ModelConfig
from mini_infer_engine.models.llama import LlamaLayer


class Phi3Layer(LlamaLayer):
    """One decoder layer."""

    def make_attention(self, config: ModelConfig, index: int, backend: Backend) -> Attention:
        """Attention from one tensor of queries, keys and values."""
        return Attention(config, index, backend, names=("qkv_proj",))

    def make_feed_forward(self, config: ModelConfig, backend: Backend) -> FeedForward:
        """Feed-forward from one tensor of gate and up."""
        return FeedForward(config, backend, names=("gate_up_proj",))


class Phi3ForCausalLM(CausalLM):
    """The whole model."""

    layer_class = Phi3Layer
