"""What all decoder-only models have around their layers: embedding, rotations, norm, logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from mini_infer_kernels.kernel_set import KernelSet

from mini_infer_engine.layers.attention import AttentionInputs
from mini_infer_engine.layers.backend import Backend
from mini_infer_engine.layers.norm import RMSNorm
from mini_infer_engine.layers.rotary import Rotation, make_rotary
from mini_infer_engine.model_config import ModelConfig


class DecoderLayer(Protocol):
    """One layer of a model."""

    def __init__(self, config: ModelConfig, index: int, backend: Backend) -> None:
        """Allocates the weights of the layer of that index, uninitialised."""

    def __call__(
        self,
        residual: torch.Tensor,
        rotations: Sequence[Rotation],
        cache: torch.Tensor,
        inputs: AttentionInputs,
    ) -> torch.Tensor:
        """Applies the layer to the tokens of a batch.

        Args:
            residual: [T, hidden_size], the residual stream; may be changed in place.
            rotations: The tokens' turns, for each of the model's rotary embeddings.
            cache: Keys and values of this layer.
            inputs: The batch.

        Returns:
            The residual stream behind the layer.
        """
        ...

    def destinations(self) -> dict[str, torch.Tensor]:
        """Where each checkpoint tensor of this layer goes, by its name within the layer."""
        ...


class CausalLM:
    """A whole model: token ids to logits. Each architecture says what its layers are.

    Plain objects instead of `torch.nn.Module`: nothing is trained, and on a CPU the calls of a
    small model's modules take as long as its products.

    Attributes:
        layer_class: Kind of layer.
        norm_class: Kind of the norm behind the last layer.
    """

    layer_class: ClassVar[type[DecoderLayer]]
    norm_class: ClassVar[type[RMSNorm]] = RMSNorm

    @property
    def embedding_scale(self) -> float | None:
        """Factor of the embeddings."""
        return None

    def __init__(self, config: ModelConfig, backend: Backend, *, num_positions: int) -> None:
        """Allocates the weights, uninitialised; a loader fills `destinations()`.

        Args:
            config: Shape of the model.
            backend: Where it lies and what computes it.
            num_positions: Positions that may come.
        """
        self._config = config
        self._backend = backend
        self._embedding = backend.empty(config.vocab_size, config.hidden_size)
        tied = config.tie_word_embeddings
        self._lm_head = self._embedding if tied else torch.empty_like(self._embedding)
        self._norm = self.norm_class(config.hidden_size, config.rms_norm_eps, backend)
        self._ropes = [
            make_rotary(rope, num_positions, backend.dtype, backend.device) for rope in config.ropes
        ]
        self._layers = [
            self.layer_class(config, index, backend) for index in range(config.num_layers)
        ]

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
        inputs.prepare()
        rotations = [rope.at(inputs.positions, inputs.rotation_lens) for rope in self._ropes]
        residual = self.embed(token_ids)
        for layer, layer_cache in zip(self._layers, cache.unbind(), strict=True):
            residual = layer(residual, rotations, layer_cache, inputs)
        return self._norm(residual)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """What the residual stream begins with: [T] to [T, hidden_size]."""
        return self._backend.kernels.embedding(token_ids, self._embedding, self.embedding_scale)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Scores of the next token: [R, hidden_size] to [R, vocab_size] float32, perhaps `out`."""
        logits = self._backend.float32_product(hidden, self._lm_head, out)
        cap = self._config.logit_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def destinations(self) -> dict[str, torch.Tensor]:
        """Where each checkpoint tensor goes."""
        found = {"model.embed_tokens.weight": self._embedding}
        found |= self._norm.destinations("model.norm")
        if not self._config.tie_word_embeddings:
            found["lm_head.weight"] = self._lm_head
        for index, layer in enumerate(self._layers):
            for name, tensor in layer.destinations().items():
                found[f"model.layers.{index}.{name}"] = tensor
        return found

    @property
    def kernels(self) -> KernelSet:
        """What computes it."""
        return self._backend.kernels

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._backend.device

    @property
    def num_bytes(self) -> int:
        """Memory of the weights, on whatever device."""
        return sum(tensor.nbytes for tensor in self.destinations().values())

    def free(self) -> None:
        """Gives the weights' memory back, whoever else refers to them; the model is gone then."""
        for tensor in self.destinations().values():
            tensor.untyped_storage().resize_(0)

    def ignorable(self) -> frozenset[str]:
        """Checkpoint tensors that may be there and are not needed."""
        tied = {"lm_head.weight"} if self._config.tie_word_embeddings else set()
        return frozenset({"*.rotary_emb.inv_freq", *tied})
