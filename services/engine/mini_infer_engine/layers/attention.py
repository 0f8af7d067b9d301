"""Self-attention over the paged cache, and what a batch tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mini_infer_engine.layers.backend import Backend
from mini_infer_engine.layers.norm import RMSNorm
from mini_infer_engine.layers.rotary import Rotation
from mini_infer_engine.model_config import ModelConfig

_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """R rows of one token each that gather equally many blocks.

    Attributes:
        block_tables: [R, B] int64; B are the blocks that the longest of them uses.
        masks: For each of the model's windows [R, 1, 1, B * block_size], 0 or -inf, in the model's
            data type.
    """

    block_tables: torch.Tensor
    masks: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """What the layers need to know of a batch of S sequences and T tokens, on the device.

    The first `num_decodes` rows have one token each, the others any number.

    Attributes:
        positions: [T] int64, of the tokens in their sequences.
        rotation_lens: [T] int64, the length of text that each token is turned for; None where
            the model does not ask (see `layers/rotary.py`).
        slot_mapping: [T] int64, the slot of each token.
        num_decodes: Rows at the front with one token.
        decode_groups: Groups of these rows. Empty where there are no such rows, or where the cache
            that the layers get is the only row's tokens in order.
        decode_order: [num_decodes] int64, the rows of the first group, then those of the next;
            None where all are in one group or none.
        prefill_block_tables: [S - num_decodes, B'] int64, or None where there are none.
        prefill_lens: Tokens of each other row.
        prefill_context_lens: Tokens of each other row in the cache, its new ones included.
    """

    positions: torch.Tensor
    rotation_lens: torch.Tensor | None
    slot_mapping: torch.Tensor
    num_decodes: int
    decode_groups: tuple[DecodeGroup, ...]
    decode_order: torch.Tensor | None
    prefill_block_tables: torch.Tensor | None
    prefill_lens: list[int]
    prefill_context_lens: list[int]


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
        if head_norm is not None:
            for name in ("q_norm", "k_norm"):
                self._norms[name] = head_norm(head_dim, config.rms_norm_eps, backend)
        self._config = config
        self._kernels = backend.kernels
        rope = config.layer_ropes[index]
        self._rope_index = config.ropes.index(rope)
        self._width = 2 * -(-rope.rotary_dim // 2)
        self._window = config.layer_windows[index]
        self._window_index = config.windows.index(self._window)

    def __call__(
        self,
        x: torch.Tensor,
        rotations: Sequence[Rotation],
        cache: torch.Tensor,
        inputs: AttentionInputs,
    ) -> torch.Tensor:
        """Stores the new keys and values, then attends.

        Args:
            x: [T, hidden_size].
            rotations: The tokens' turns, for each of the model's rotary embeddings.
            cache: [num_blocks, block_size, 2 * num_kv_heads, head_dim], the layer's.
            inputs: The batch.

        Returns:
            [T, num_q_heads * head_dim].
        """
        num_q_heads, num_kv_heads = self._config.num_q_heads, self._config.num_kv_heads
        heads = self._qkv(x).view(-1, num_q_heads + 2 * num_kv_heads, self._config.head_dim)
        query, key_value = heads.split_with_sizes((num_q_heads, 2 * num_kv_heads), 1)
        turning = heads[:, : num_q_heads + num_kv_heads]
        if self._norms:
            key = key_value[:, :num_kv_heads]
            query.copy_(self._norms["q_norm"](query))
            key.copy_(self._norms["k_norm"](key))
        if self._width < self._config.head_dim:
            turning = turning[..., : self._width]
        self._kernels.rope(turning, *rotations[self._rope_index])
        self._kernels.store_kv(key_value, cache, inputs.slot_mapping)
        return self._attend(query, cache, inputs).flatten(1)

    def destinations(self, prefix: str) -> dict[str, torch.Tensor]:
        """Where each checkpoint tensor goes."""
        found = {**self._qkv.destinations(prefix), **self.output.destinations(prefix)}
        for name, norm in self._norms.items():
            found |= norm.destinations(f"{prefix}{name}")
        return found

    def _attend(
        self, query: torch.Tensor, cache: torch.Tensor, inputs: AttentionInputs
    ) -> torch.Tensor:
        """[T, num_q_heads, head_dim] to the same."""
        split = inputs.num_decodes
        if not inputs.prefill_lens:
            return self._decode(query, cache, inputs)
        prefilled = self._kernels.prefill_attention(
            query[split:],
            cache,
            inputs.prefill_block_tables,
            inputs.prefill_lens,
            inputs.prefill_context_lens,
            self._config.attention_scale,
            window=self._window,
            softcap=self._config.attention_softcap,
        )
        if not split:
            return prefilled
        return torch.cat((self._decode(query[:split], cache, inputs), prefilled))

    def _decode(
        self, query: torch.Tensor, cache: torch.Tensor, inputs: AttentionInputs
    ) -> torch.Tensor:
        groups = inputs.decode_groups
        if not groups:
            window = cache if self._window is None else cache[:, -self._window :]
            return self._decode_rows(query, window, None, None)
        if inputs.decode_order is None:
            return self._decode_group(query, cache, groups[0])
        sizes = [group.block_tables.shape[0] for group in groups]
        queries = query.index_select(0, inputs.decode_order).split_with_sizes(sizes)
        attended = [
            self._decode_group(rows, cache, group)
            for rows, group in zip(queries, groups, strict=True)
        ]
        return torch.empty_like(query).index_copy_(0, inputs.decode_order, torch.cat(attended))

    def _decode_group(
        self, query: torch.Tensor, cache: torch.Tensor, group: DecodeGroup
    ) -> torch.Tensor:
        return self._decode_rows(query, cache, group.block_tables, group.masks[self._window_index])

    def _decode_rows(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        block_tables: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        return self._kernels.decode_attention(
            query,
            cache,
            block_tables,
            mask,
            self._config.attention_scale,
            softcap=self._config.attention_softcap,
        )
