"""Llama: pre-norm decoder with RoPE, grouped-query attention and SwiGLU.

Source: Touvron et al., "Llama 2", 2023; tensor names as in Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mini_infer_engine.layers.attention import Attention, AttentionInputs
from mini_infer_engine.layers.backend import Backend
from mini_infer_engine.layers.decoder import CausalLM
from mini_infer_engine.layers.feed_forward import FeedForward
from mini_infer_engine.layers.norm import RMSNorm
from mini_infer_engine.layers.rotary import Rotation
from mini_infer_engine.model_config import ModelConfig


class LlamaLayer:
    """One decoder layer: attention and feed-forward, each behind a norm."""

    def __init__(self, config: ModelConfig, index: int, backend: Backend) -> None:
        """Allocates the weights, uninitialised."""
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, backend)
        self.attention = self.make_attention(config, index, backend)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, backend)
        self.feed_forward = self.make_feed_forward(config, backend)

    def make_attention(self, config: ModelConfig, index: int, backend: Backend) -> Attention:
        """What relatives of Llama replace."""
        return Attention(config, index, backend)

    def make_feed_forward(self, config: ModelConfig, backend: Backend) -> FeedForward:
        """What relatives of Llama replace."""
        return FeedForward(config, backend)

    def __call__(
        self,
        residual: torch.Tensor,
        rotations: Sequence[Rotation],
        cache: torch.Tensor,
        inputs: AttentionInputs,
    ) -> torch.Tensor:
        """As `DecoderLayer.__call__`."""
        attended = self.attention(residual, self.input_norm, rotations, cache, inputs)
        residual = self.attention.output.add_to_(residual, attended)
        activated = self.feed_forward(residual, self.post_attention_norm)
        return self.feed_forward.down.add_to_(residual, activated)

    def destinations(self) -> dict[str, torch.Tensor]:
        """As `DecoderLayer.destinations`."""
        return {
            **self.input_norm.destinations("input_layernorm"),
            **self.attention.destinations("self_attn."),
            **self.post_attention_norm.destinations("post_attention_layernorm"),
            **self.feed_forward.destinations("mlp."),
        }


class LlamaForCausalLM(CausalLM):
    """The whole model."""

    layer_class = LlamaLayer
