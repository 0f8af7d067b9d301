"""Llama: pre-norm decoder with RoPE, grouped-query attention and SwiGLU.

Source: Touvron et al., "Llama 2", 2023; tensor names as in Hugging Face checkpoints.
"""

from __future__ import annotations

import torch
from mini_infer_kernels.kernel_set import KernelSet
from mini_infer_kernels.reference.rope import rope_table
from torch.nn import functional

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
        residual: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: torch.Tensor,
        inputs: AttentionInputs,
    ) -> torch.Tensor:
        """Applies the layer to the tokens of a batch.

        Args:
            residual: [T, hidden_size], the residual stream; changed in place.
            cos: [T, 1, head_dim], of the rotations of the tokens' positions.
            sin: Likewise.
            cache: Keys and values of this layer.
            inputs: The batch.

        Returns:
            The residual stream behind the layer.
        """
        kernels, eps = self._kernels, self._config.rms_norm_eps
        num_q_heads, num_kv_heads = self._config.num_q_heads, self._config.num_kv_heads
        qkv = self.qkv(kernels.rmsnorm(residual, self.input_norm, eps))
        heads = qkv.view(-1, num_q_heads + 2 * num_kv_heads, self._config.head_dim)
        kernels.rope(heads[:, : num_q_heads + num_kv_heads], cos, sin)
        query, key_value = heads.split_with_sizes((num_q_heads, 2 * num_kv_heads), 1)
        attended = paged_attention(query, key_value, cache, inputs, kernels)
        residual = self.o.add_to_(residual, attended.flatten(1))
        gate_up = self.gate_up(kernels.rmsnorm(residual, self.post_attention_norm, eps))
        return self.down.add_to_(residual, kernels.silu_and_mul(gate_up))

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
        self,
        config: ModelConfig,
        kernels: KernelSet,
        dtype: torch.dtype,
        device: torch.device,
        *,
        num_positions: int,
    ) -> None:
        """Allocates the weights, uninitialised; a loader fills `destinations()`."""
        self._config = config
        self._kernels = kernels
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = torch.empty(shape, dtype=dtype, device=device)
        tied = config.tie_word_embeddings
        self.lm_head = self.embedding if tied else torch.empty_like(self.embedding)
        self.norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        turns = rope_table(config.head_dim, num_positions, config.rope_theta, device)
        self._rotations = torch.stack(turns, 1).to(dtype).unsqueeze(2)
        self.layers = [LlamaLayer(config, kernels, dtype, device) for _ in range(config.num_layers)]

    def __call__(
        self, token_ids: torch.Tensor, cache: torch.Tensor, inputs: AttentionInputs
    ) -> torch.Tensor:
        """Runs the layers over the tokens of a batch; their keys and values enter the cache.

        Args:
            token_ids: [T] int64.
            cache: [num_layers, num_blocks, block_size, 2 * num_kv_heads, head_dim].
            inputs: The batch.

        Returns:
            [T, hidden_size], normalized: what `logits` takes.
        """
        cos, sin = self._rotations.index_select(0, inputs.positions).unbind(1)
        residual = functional.embedding(token_ids, self.embedding)
        for layer, layer_cache in zip(self.layers, cache.unbind(), strict=True):
            residual = layer(residual, cos, sin, layer_cache, inputs)
        return self._kernels.rmsnorm(residual, self.norm, self._config.rms_norm_eps)

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
