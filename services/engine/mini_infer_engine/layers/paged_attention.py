"""Attention of a batch by Triton's kernels: rows that decode in one launch, prompts in another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from mini_infer_kernels.decode_attention import triton_decode_attention
from mini_infer_kernels.decode_plan import DecodePlan
from mini_infer_kernels.prefill_attention import triton_prefill_attention
from mini_infer_kernels.step_inputs import StepRows, TokenInputs, triton_step_inputs

from mini_infer_engine.layers.attention import AttentionPattern


@dataclass(frozen=True, slots=True)
class PagedAttentionInputs:
    """What the layers need to know of a batch of S sequences and T tokens, on the device.

    The first `num_decodes` rows have one token each, the others any number.

    Attributes:
        tokens: What is computed of the tokens, filled in by `prepare`.
        rows: The sequences.
        num_seqs: Rows that are sequences; one of padding may follow them.
        num_decodes: Rows at the front with one token.
        max_row_tokens: Tokens of the longest sequence.
        max_padding: Tokens of the row of padding.
        last_ids: [rows at most] int32, what the step before has chosen.
        block_tables: [slots, blocks] int32.
        block_size: Tokens in a block.
        plan: How the rows that decode are cut up.
        attended: [T, num_q_heads, head_dim], where the outputs of each layer go, and stay until
            those of the next one. Those of padding are not written.
    """

    tokens: TokenInputs
    rows: StepRows
    num_seqs: int
    num_decodes: int
    max_row_tokens: int
    max_padding: int
    last_ids: torch.Tensor
    block_tables: torch.Tensor
    block_size: int
    plan: DecodePlan
    attended: torch.Tensor

    @property
    def positions(self) -> torch.Tensor:
        """As `AttentionInputs`."""
        return self.tokens.positions

    @property
    def rotation_lens(self) -> torch.Tensor | None:
        """As `AttentionInputs`."""
        return self.tokens.rotation_lens

    @property
    def slot_mapping(self) -> torch.Tensor:
        """As `AttentionInputs`."""
        return self.tokens.slot_mapping

    def prepare(self) -> None:
        """As `AttentionInputs.prepare`."""
        triton_step_inputs(
            self.rows,
            self.last_ids,
            self.block_tables,
            self.block_size,
            max(self.max_row_tokens, self.max_padding),
            self.tokens,
        )
        if self.num_decodes:
            self.plan.update(self.tokens.context_lens[: self.num_decodes])

    def attend(
        self, query: torch.Tensor, cache: torch.Tensor, pattern: AttentionPattern
    ) -> torch.Tensor:
        """As `AttentionInputs.attend`; gives `attended`."""
        split, num_seqs = self.num_decodes, self.num_seqs
        slots, context_lens = self.rows.slots, self.tokens.context_lens
        if split:
            triton_decode_attention(
                query[:split],
                cache,
                self.block_tables,
                slots[:split],
                context_lens[:split],
                self.plan,
                pattern.scale,
                window=pattern.window,
                softcap=pattern.softcap,
                out=self.attended[:split],
            )
        if split < num_seqs:
            # Its tokens' places count from the beginning of the step, so it gets all of them.
            triton_prefill_attention(
                query,
                cache,
                self.block_tables,
                slots[split:num_seqs],
                self.rows.starts[split : num_seqs + 1],
                context_lens[split:num_seqs],
                self.max_row_tokens,
                pattern.scale,
                window=pattern.window,
                softcap=pattern.softcap,
                out=self.attended,
            )
        return self.attended
