"""Llama: pre-norm decoder with RoPE, grouped-query attention and SwiGLU.

Source: Touvron et al., "Llama 2", 2023; tensor names as in Hugging Face checkpoints.
"""

from __future__ import annotations

import torch
from mini_infer_kernels.kernel_set import KernelSet
from torch.nn import functional

from mini_infer_engine.kv_cache import KVCache
from mini_infer_engine.layers.attention import AttentionInputs, paged_attention
from mini_infer_engine.layers.linear import FusedLinear
from mini_infer_engine.model_config import ModelConfig


class LlamaLayer:
    """One decoder layer."""

    def __init__(
        self, config: ModelConfig, kernels: KernelSet, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocates the weights, uninitialised."""
        self._config = config
        self._kernels = kernels
        hidden, head_dim = config.hidden_size, config.head_dim
        q_size, kv_size = config.num_q_heads * head_dim, config.num_kv_heads * head_dim

        def linear(in_features: int, parts: dict[str, int], *, bias: bool) -> FusedLinear:
            return FusedLinear(in_features, parts, bias=bias, dtype=dtype, device=device)

        qkv = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        gate_up = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.qkv = linear(hidden, qkv, bias=config.attention_bias)
        self.o = linear(q_size, {"o_proj": hidden}, bias=config.attention_bias)
        self.gate_up = linear(hidden, gate_up, bias=config.mlp_bias)
        self.down = linear(config.intermediate_size, {"down_proj": hidden}, bias=config.mlp_bias)
        self.input_norm = torch.empty(hidden, dtype=dtype, device=device)
        self.post_attention_norm = torch.empty(hidden, dtype=dtype, device=device)

    def __call__(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        cache: tuple[torch.Tensor, torch.Tensor],
        inputs: AttentionInputs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Applies the layer to the tokens of a batch.

        Args:
            hidden: [T, hidden_size], what the layer before gave.
            residual: [T, hidden_size], the stream before that, or None at the first layer.
            cache: Keys and values of this layer.
            inputs: The batch.

        Returns:
            What this layer gives and the residual stream; their sum is the layer's output.
        """
        kernels, eps = self._kernels, self._config.rms_norm_eps
        if residual is None:
            normed, residual = kernels.rmsnorm(hidden, self.input_norm, eps), hidden
        else:
            normed, residual = kernels.add_rmsnorm(hidden, residual, self.input_norm, eps)
        heads = self.qkv(normed).view(len(normed), -1, self._config.head_dim)
        num_q_heads, num_kv_heads = self._config.num_q_heads, self._config.num_kv_heads
        query_key, value = heads.split_with_sizes((num_q_heads + num_kv_heads, num_kv_heads), 1)
        query_key = kernels.rope(query_key, inputs.cos, inputs.sin)
        query, key = query_key.split_with_sizes((num_q_heads, num_kv_heads), 1)
        attended = paged_attention(query, key, value, cache, inputs, kernels)
        normed, residual = kernels.add_rmsnorm(
            self.o(attended.flatten(1)), residual, self.post_attention_norm, eps
        )
        return self.down(kernels.silu_and_mul(self.gate_up(normed))), residual

    def destinations(self, prefix: str) -> dict[str, torch.Tensor]:
        """Where each checkpoint tensor of this layer goes."""
        return {
            f"{prefix}input_layernorm.weight": self.input_norm,
            f"{prefix}post_attention_layernorm.weight": self.post_attention_norm,
            **self.qkv.destinations(f"{prefix}self_attn."),
            **self.o.destinations(f"{prefix}self_attn."),
            **self.gate_up.destinations(f"{prefix}mlp."),
            **self.down.destinations(f"{prefix}mlp."),
        }


class LlamaForCausalLM:
    """The whole model: token ids to logits.

    Plain objects instead of `torch.nn.Module`: nothing is trained, and on a CPU the calls of a
    small model's modules take as long as its products.
    """

    def __init__(
        self, config: ModelConfig, kernels: KernelSet, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocates the weights, uninitialised; a loader fills `destinations()`."""
        self._config = config
        self._kernels = kernels
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = torch.empty(shape, dtype=dtype, device=device)
        tied = config.tie_word_embeddings
        self.lm_head = self.embedding if tied else torch.empty_like(self.embedding)
        self.norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        self.layers = [LlamaLayer(config, kernels, dtype, device) for _ in range(config.num_layers)]

    def __call__(
        self, token_ids: torch.Tensor, cache: KVCache, inputs: AttentionInputs
    ) -> torch.Tensor:
        """Runs the layers over the tokens of a batch; their keys and values enter the cache.

        Args:
            token_ids: [T] int64.
            cache: The paged cache.
            inputs: The batch.

        Returns:
            [T, hidden_size], normalized: what `logits` takes.
        """
        hidden = functional.embedding(token_ids, self.embedding)
        residual: torch.Tensor | None = None
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            hidden, residual = layer(hidden, residual, layer_cache, inputs)
        assert residual is not None
        return self._kernels.add_rmsnorm(hidden, residual, self.norm, self._config.rms_norm_eps)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of the next token: [R, hidden_size] to [R, vocab_size] float32."""
        return functional.linear(hidden, self.lm_head).float()

    def destinations(self) -> dict[str, torch.Tensor]:
        """Where each checkpoint tensor goes."""
        found = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        if not self._config.tie_word_embeddings:
            found["lm_head.weight"] = self.lm_head
        for index, layer in enumerate(self.layers):
            found |= layer.destinations(f"model.layers.{index}.")
        return found

    def ignorable(self) -> frozenset[str]:
        """Checkpoint tensors that may be there and are not needed."""
        tied = {"lm_head.weight"} if self._config.tie_word_embeddings else set()
        return frozenset({"*.rotary_emb.inv_freq", *tied})
