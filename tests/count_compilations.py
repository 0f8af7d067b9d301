"""Prints how many forms of each kernel the steps of an engine need, as JSON: no GPU, no compiler.

Triton looks at every launch for the form that fits its arguments, and compiles it if it is new.
Here it finds a device of compute capability 9 that does nothing, and a compiler that counts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import triton
from mini_infer_kernels import activation, embedding, gemv, qk_norm_rope_store, rmsnorm
from mini_infer_kernels.decode_attention import triton_decode_attention
from mini_infer_kernels.decode_plan import DecodePlan
from mini_infer_kernels.hopper_prefill.launch import launch_on_hopper
from mini_infer_kernels.prefill_attention import triton_prefill_attention
from mini_infer_kernels.step_inputs import (
    StepRows,
    TokenInputs,
    triton_step_inputs,
    triton_update_tables,
)
from triton.backends.compiler import GPUTarget

HIDDEN_SIZE, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 1024, 16, 8, 64, 16
MAX_ROWS, MAX_TOKENS = 64, 8448
CPU = torch.device("cpu")
# Rows that decode, and the lengths of prompts: one row, two, odd ones, many, and only one kind.
STEPS = [
    (1, []),
    (2, []),
    (3, []),
    (4, []),
    (16, []),
    (33, []),
    (0, [1]),
    (0, [2]),
    (0, [3]),
    (0, [4]),
    (0, [17]),
    (0, [16, 8000]),
    (1, [5]),
    (5, [129]),
    (16, [16]),
    (17, [1, 16, 700]),
    (33, [8400]),
]


class Device:
    """What Triton asks a driver for before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def staged(buffer: torch.Tensor, lengths: list[int]) -> Iterator[torch.Tensor]:
    """Parts of a buffer that begin at multiples of 16 bytes, as the engine stages them."""
    start = 0
    for length in lengths:
        yield buffer[start : start + length]
        start += -(-length // 4) * 4


class Engine:
    """What an engine keeps from step to step, and one layer of a model."""

    def __init__(self) -> None:
        self.cache = bf16(8, BLOCK_SIZE, 2 * NUM_KV_HEADS, HEAD_DIM)
        self.block_tables = ints(MAX_ROWS, 520)
        self.last_ids = ints(2, MAX_ROWS)[0]
        self.plan = DecodePlan(MAX_ROWS, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, CPU)
        self.buffer = ints(MAX_TOKENS + 5 * MAX_ROWS)
        self.outputs = TokenInputs(
            ints(MAX_TOKENS),
            ints(MAX_TOKENS, dtype=torch.int64),
            None,
            ints(MAX_TOKENS, dtype=torch.int64),
            ints(MAX_ROWS),
        )
        self.table = bf16(16, 2, 1, HEAD_DIM)
        self.norm, self.head_norm = bf16(HIDDEN_SIZE), bf16(HEAD_DIM)
        self.embedding = bf16(32, HIDDEN_SIZE)
        self.qkv = bf16((NUM_Q_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, HIDDEN_SIZE)
        self.gate_up = bf16(2 * 1536, HIDDEN_SIZE)
        self.down = bf16(HIDDEN_SIZE, 1536)

    def run(self, num_decodes: int, prompts: list[int]) -> None:
        """Launches what a step launches."""
        num_rows, num_tokens = num_decodes + len(prompts), num_decodes + sum(prompts)
        lengths = [num_tokens, num_rows, num_rows, num_rows + 1, num_rows]
        rows = StepRows(*staged(self.buffer, lengths))
        longest = max([1, *prompts])
        inputs = TokenInputs(
            self.outputs.token_ids[:num_tokens],
            self.outputs.positions[:num_tokens],
            None,
            self.outputs.slot_mapping[:num_tokens],
            self.outputs.context_lens[:num_rows],
        )
        triton_update_tables(self.block_tables, self.buffer[: 3 * num_rows].view(3, -1))
        triton_step_inputs(rows, self.last_ids, self.block_tables, BLOCK_SIZE, longest, inputs)
        stream = embedding.triton_embedding(inputs.token_ids, self.embedding)
        heads = self.product(stream, self.qkv).unflatten(1, (-1, HEAD_DIM))
        cos, sin = self.table.index_select(0, inputs.positions).unbind(1)
        qk_norm_rope_store.triton_qk_norm_rope_store(
            heads, cos, sin, self.cache, inputs.slot_mapping, self.head_norm, self.head_norm, 1e-6
        )
        self.attend(heads[:, :NUM_Q_HEADS], rows, inputs.context_lens, num_decodes, longest)
        if self.is_few(stream):
            inner = gemv.triton_gemv(stream, self.gate_up, norm_weight=self.norm, gate="silu")
            gemv.triton_gemv(inner, self.down, residual=stream)
        else:
            activation.triton_silu_and_mul(self.product(stream, self.gate_up))
        sampled = stream.index_select(0, ints(num_rows))
        if self.is_few(sampled):
            gemv.triton_gemv(sampled, self.embedding, out_dtype=torch.float32)

    @staticmethod
    def is_few(x: torch.Tensor) -> bool:
        return len(x) <= gemv.max_gemv_rows(x.shape[1])

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.is_few(x):
            return gemv.triton_gemv(x, weight, norm_weight=self.norm, eps=1e-6)
        rmsnorm.triton_rmsnorm(x, self.norm, 1e-6)
        return x.new_empty(len(x), len(weight))

    def attend(
        self,
        query: torch.Tensor,
        rows: StepRows,
        context_lens: torch.Tensor,
        split: int,
        longest: int,
    ) -> None:
        out = query.new_empty(query.shape)
        if split:
            self.plan.update(context_lens[:split])
            triton_decode_attention(
                query[:split], self.cache, self.block_tables, rows.slots[:split],
                context_lens[:split], self.plan, 0.1, out=out[:split],
            )  # fmt: skip
        if split < len(context_lens):
            arguments = (
                query, self.cache, self.block_tables, rows.slots[split:], rows.starts[split:],
                context_lens[split:], longest, 0.1, None, None, out,
            )  # fmt: skip
            triton_prefill_attention(*arguments)
            launch_on_hopper(*arguments)


class Form:
    """A compiled kernel, as far as launches ask."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments: object) -> None:
        pass

    def run(self, *arguments: object) -> None:
        pass


def main() -> None:
    """Runs all steps."""
    compiled: Counter[str] = Counter()

    def compile_nothing(source: Any, target: GPUTarget, options: dict[str, Any]) -> Form:
        module = source.fn.module.removeprefix("mini_infer_kernels.")
        compiled[f"{module}.{source.fn.__name__}"] += 1
        return Form()

    triton.runtime.driver.set_active(Device())
    triton.compiler.compile = compile_nothing
    engine = Engine()
    for step in STEPS:
        engine.run(*step)
    print(json.dumps(compiled))


if __name__ == "__main__":
    main()
