"""Self-attention over the paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mini_infer_engine.layers.backend import Backend
from mini_infer_engine.layers.norm import RMSNorm
from mini_infer_engine.layers.rotary import Rotation
from mini_infer_engine.model_config import ModelConfig

_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class AttentionPattern:
    """What the queries of a layer see, and how.

    Attributes:
        scale: Factor of the scores.
        window: Tokens that a token sees, itself included, or None for all.
        window_index: Of `window` among the model's (`ModelConfig.windows`).
        softcap: Bound of the scores, or None.
    """

    scale: float
    window: int | None
    window_index: int
    softcap: float | None


class AttentionInputs(Protocol):
    """What the layers need to know of a batch of T tokens, on the device."""

    @property
    def positions(self) -> torch.Tensor:
        """[T] int64, of the tokens in their sequences."""
        ...

    @property
    def rotation_lens(self) -> torch.Tensor | None:
        """[T] int64, the length of text that each token is turned for.

        None where the model does not ask (see `layers/rotary.py`).
        """
        ...

    @property
    def slot_mapping(self) -> torch.Tensor:
        """[T] int64, the slot of each token."""
        ...

    def prepare(self) -> None:
        """Computes what the layers share; once a step, before them."""
        ...

    def attend(
        self, query: torch.Tensor, cache: torch.Tensor, pattern: AttentionPattern
    ) -> torch.Tensor:
        """Lets every token attend to its sequence, whose keys and values the cache holds.

        Args:
            query: [T, num_q_heads, head_dim], perhaps some heads of a wider tensor.
            cache: [num_blocks, block_size, 2 * num_kv_heads, head_dim], the layer's.
            pattern: The layer's.

        Returns:
            [T, num_q_heads, head_dim].
        """
        ...


class Attention:
    """Queries, keys and values of new tokens, and what they attend to.

    Attributes:
        output: The projection behind it, which the decoder layer applies: most add it to the
            residual stream right away.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        backend: Backend,
        *,
        names: tuple[str, ...] = _QKV,
        head_norm: type[RMSNorm] | None = None,
    ) -> None:
        """Allocates the weights, uninitialised.

        Args:
            config: Of the model.
            index: The layer's.
            backend: Where they lie and what computes on them.
            names: The checkpoint's names of the projections, or of a tensor that holds all.
            head_norm: Kind of norm of each query and key head before it is turned.
        """
        q_heads, kv_heads, head_dim = config.num_q_heads, config.num_kv_heads, config.head_dim
        sizes = [q_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        parts = dict(zip(names, sizes if len(names) == 3 else [sum(sizes)], strict=True))
        hidden = config.hidden_size
        self._qkv = backend.linear(hidden, parts, bias=config.qkv_bias)
        self.output = backend.linear(sizes[0], {"o_proj": hidden}, bias=config.output_bias)
        self._norms: dict[str, RMSNorm] = {}
        self._norm_options: dict[str, Any] = {}
        if head_norm is not None:
            norms = [head_norm(head_dim, config.rms_norm_eps, backend) for _ in range(2)]
            self._norms = dict(zip(("q_norm", "k_norm"), norms, strict=True))
            self._norm_options = {
                "q_weight": norms[0].weight,
                "k_weight": norms[1].weight,
                "eps": config.rms_norm_eps,
                "gemma": head_norm.is_gemma,
            }
        self._num_q_heads = q_heads
        self._heads_shape = (-1, q_heads + 2 * kv_heads, head_dim)
        self._norm_turn_and_store = backend.kernels.qk_norm_rope_store
        self._rope_index = config.ropes.index(config.layer_ropes[index])
        window = config.layer_windows[index]
        self._pattern = AttentionPattern(
            scale=config.attention_scale,
            window=window,
            window_index=config.windows.index(window),
            softcap=config.attention_softcap,
        )

    def __call__(
        self,
        x: torch.Tensor,
        norm: RMSNorm,
        rotations: Sequence[Rotation],
        cache: torch.Tensor,
        inputs: AttentionInputs,
    ) -> torch.Tensor:
        """Stores the new keys and values, then attends.

        Args:
            x: [T, hidden_size].
            norm: Comes before everything else.
            rotations: The tokens' turns, for each of the model's rotary embeddings.
            cache: [num_blocks, block_size, 2 * num_kv_heads, head_dim], the layer's.
            inputs: The batch.

        Returns:
            [T, num_q_heads * head_dim].
        """
        heads = self._qkv(x, norm).view(self._heads_shape)
        cos, sin = rotations[self._rope_index]
        self._norm_turn_and_store(heads, cos, sin, cache, inputs.slot_mapping, **self._norm_options)
        return inputs.attend(heads[:, : self._num_q_heads], cache, self._pattern).flatten(1)

    def destinations(self, prefix: str) -> dict[str, torch.Tensor]:
        """Where each checkpoint tensor goes."""
        found = {**self._qkv.destinations(prefix), **self.output.destinations(prefix)}
        for name, norm in self._norms.items():
            found |= norm.destinations(f"{prefix}{name}")
        return found
