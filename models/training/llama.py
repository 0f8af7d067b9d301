"""A Llama-architecture language model in plain torch, for training and evaluation.

The engine has its own model code for serving; this module exists so that training needs nothing
but torch and so that the two implementations can be compared. It follows the Llama layout of
Hugging Face (RMSNorm, rotary embedding by halves, grouped-query attention, SwiGLU, tied
embeddings), and parameter names equal the names in the checkpoint. It trains and scores; it has no
key-value cache, since the engine samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

ROPE_THETA = 10000.0
RMS_NORM_EPS = 1e-5
MAX_POSITIONS = 4096
INIT_STD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """The sizes of a model; every field is a count."""

    vocab_size: int = 4096
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int = 32

    def __post_init__(self) -> None:
        """Checks that query heads share key-value heads evenly."""
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"expected num_q_heads to be a multiple of num_kv_heads, "
                f"got {self.num_q_heads} and {self.num_kv_heads}"
            )


SHAPES = {
    "demo": LlamaShape(
        hidden_size=128, intermediate_size=448, num_layers=12, num_q_heads=4, num_kv_heads=2
    ),
    "demo-draft": LlamaShape(
        hidden_size=96, intermediate_size=288, num_layers=3, num_q_heads=3, num_kv_heads=1
    ),
}


def rotary_angles(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Computes the cosines and sines of the rotary embedding.

    Args:
        positions: `[num_tokens]`, int64, position of each token in its sequence.
        head_dim: Size of one attention head.

    Returns:
        Cosines and sines, each `[num_tokens, head_dim]`, fp32; the two halves are equal.

    Source: RoFormer, section 3.2; halves instead of interleaved pairs as in Hugging Face's Llama.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions.float()[:, None] * ROPE_THETA ** -exponents[None, :]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates queries or keys by the angles of their positions.

    Args:
        x: `[batch, num_heads, num_tokens, head_dim]`.
        cos: `[num_tokens, head_dim]`, fp32.
        sin: `[num_tokens, head_dim]`, fp32.

    Returns:
        The rotated tensor, same shape and dtype as `x`.
    """
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


class RMSNorm(nn.Module):
    """`y = x / sqrt(mean(x^2) + eps) * weight`, the mean taken in fp32."""

    def __init__(self, size: int) -> None:
        """Creates the scale, `[size]`, as ones."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension of `x`, any shape `[..., size]`."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_NORM_EPS)
        return self.weight * (wide * scale).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, shape: LlamaShape) -> None:
        """Creates the four projections, none with a bias."""
        super().__init__()
        self.head_dim = shape.head_dim
        q_size = shape.num_q_heads * shape.head_dim
        kv_size = shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attends over the tokens of `x`.

        Args:
            x: `[batch, num_tokens, hidden_size]`.
            cos: `[num_tokens, head_dim]`.
            sin: `[num_tokens, head_dim]`.

        Returns:
            `[batch, num_tokens, hidden_size]`.
        """
        batch, num_tokens, _ = x.shape
        heads = (batch, num_tokens, -1, self.head_dim)
        query = apply_rotary(self.q_proj(x).view(heads).transpose(1, 2), cos, sin)
        key = apply_rotary(self.k_proj(x).view(heads).transpose(1, 2), cos, sin)
        value = self.v_proj(x).view(heads).transpose(1, 2)
        out = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        return torch.as_tensor(self.o_proj(out.transpose(1, 2).reshape(batch, num_tokens, -1)))


class SwiGLU(nn.Module):
    """The feed-forward part: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, shape: LlamaShape) -> None:
        """Creates the three projections, none with a bias."""
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[..., hidden_size]` to the same shape."""
        hidden = functional.silu(self.gate_proj(x)) * self.up_proj(x)
        return torch.as_tensor(self.down_proj(hidden))


class DecoderLayer(nn.Module):
    """One pre-norm block: attention, then feed-forward, each added to its input."""

    def __init__(self, shape: LlamaShape) -> None:
        """Creates the parts under their checkpoint names."""
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size)
        self.mlp = SwiGLU(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Maps `[batch, num_tokens, hidden_size]` to the same shape; see `Attention.forward`."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return torch.as_tensor(x + self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Embedding, layers and the last norm: everything under `model.` in the checkpoint."""

    def __init__(self, shape: LlamaShape) -> None:
        """Creates the parts under their checkpoint names."""
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size)


class Llama(nn.Module):
    """The whole language model; the output matrix is the embedding matrix."""

    def __init__(self, shape: LlamaShape) -> None:
        """Creates the model with GPT-2 style initial weights from torch's global seed."""
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        residual_std = INIT_STD / math.sqrt(2 * shape.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=residual_std)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=INIT_STD)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Computes the logits of the next token after each token.

        Args:
            token_ids: `[batch, num_tokens]`, int64.

        Returns:
            `[batch, num_tokens, vocab_size]`, in the dtype of the computation.
        """
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        cos, sin = rotary_angles(positions, self.shape.head_dim)
        x = self.model.embed_tokens(token_ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return functional.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def num_parameters(self) -> int:
        """Returns the number of weights, the tied output matrix counted once."""
        return sum(parameter.numel() for parameter in self.parameters())
