"""Gemma 2: norms before and behind each sublayer, scaled embeddings, soft caps.

Every other layer has a sliding window; norms multiply by 1 + weight; scores and logits stay within
soft caps (`ModelConfig.attention_softcap`, `logit_softcap`).

Source: Gemma Team, "Gemma 2", 2024.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mini_infer_engine.layers.attention import Attention, AttentionInputs
from mini_infer_engine.layers.backend import Backend
from mini_infer_engine.layers.decoder import CausalLM
from mini_infer_engine.layers.feed_forward import FeedForward
from mini_infer_engine.layers.norm import GemmaRMSNorm
from mini_infer_engine.layers.rotary import Rotation
from mini_infer_engine.model_config import ModelConfig


class Gemma2Layer:
    """One decoder layer: attention and feed-forward, each between two norms."""

    def __init__(self, config: ModelConfig, index: int, backend: Backend) -> None:
        """Allocates the weights, uninitialised."""

        def norm() -> GemmaRMSNorm:
            return GemmaRMSNorm(config.hidden_size, config.rms_norm_eps, backend)

        self.input_norm = norm()
        self.attention = self.make_attention(config, index, backend)
        self.post_attention_norm = norm()
        self.pre_feed_forward_norm = norm()
        self.feed_forward = FeedForward(config, backend)
        self.post_feed_forward_norm = norm()

    def make_attention(self, config: ModelConfig, index: int, backend: Backend) -> Attention:
        """What Gemma 3 replaces."""
        return Attention(config, index, backend)

    def __call__(
        self,
        residual: torch.Tensor,
        rotations: Sequence[Rotation],
        cache: torch.Tensor,
        inputs: AttentionInputs,
    ) -> torch.Tensor:
        """As `DecoderLayer.__call__`."""
        attended = self.attention(residual, self.input_norm, rotations, cache, inputs)
        residual = residual + self.post_attention_norm(self.attention.output(attended))
        activated = self.feed_forward(residual, self.pre_feed_forward_norm)
        return residual + self.post_feed_forward_norm(self.feed_forward.down(activated))

    def destinations(self) -> dict[str, torch.Tensor]:
        """As `DecoderLayer.destinations`."""
        return {
            **self.input_norm.destinations("input_layernorm"),
            **self.attention.destinations("self_attn."),
            **self.post_attention_norm.destinations("post_attention_layernorm"),
            **self.pre_feed_forward_norm.destinations("pre_feedforward_layernorm"),
            **self.feed_forward.destinations("mlp."),
            **self.post_feed_forward_norm.destinations("post_feedforward_layernorm"),
        }


class Gemma2ForCausalLM(CausalLM):
    """The whole model."""

    layer_class = Gemma2Layer
    norm_class = GemmaRMSNorm

    @property
    def embedding_scale(self) -> float:
        """The square root of the hidden size."""
        return math.sqrt(self._config.hidden_size)
