"""Shares out the tokens of a decode step evenly among the programs of decode attention.

The visible tokens of all sequences, cut into tiles of `TILE` tokens, form one line. Each program
of a key-value head takes an equal piece of it, wherever sequences begin and end: no mix of lengths
leaves some programs at work while the others wait (Osama et al., "Stream-K", 2023). The pieces are
computed on the device from the lengths, so one CUDA graph serves all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from mini_infer_kernels.launch import Launcher

TILE = 64
"""Tokens that are not shared out further."""
ALL_TOKENS = 2**31 - 1
"""The window of a token that sees its whole sequence."""
_PROGRAMS_PER_SM = 4
"""What the registers of a multiprocessor hold of the kernel at 64 threads a program."""
_PROGRAMS_WITHOUT_GPU = 32
_PROGRAM_BLOCK = 16
"""Programs whose beginnings a program of `_schedule_kernel` finds."""


class DecodePlan:
    """Who attends to what in a decode step, and what the programs leave to each other.

    The layers of a model share a plan: `update` comes once a step, before the first of them. They
    use `partials` one after the other, so all of them run on one stream.

    Attributes:
        max_batch: Sequences of a step at most.
        num_q_heads: Query heads.
        num_kv_heads: Heads of keys, and of values.
        head_dim: Elements of a head.
        num_programs: Programs of each key-value head.
        num_seqs: Sequences of the step, padding rows included.
        partials: [2 * num_programs, num_kv_heads, group, head_dim] float32. A program may end one
            sequence that began before it and begin another that ends after it.
        partial_lses: [2 * num_programs, num_kv_heads, group] float32, the logarithms to base 2 of
            what `partials` were divided by.
        arrivals: [max_batch, num_kv_heads] int32, the programs that are done with a sequence; zero
            before and after each layer.
    """

    def __init__(
        self,
        max_batch: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device,
        windows: Sequence[int | None] = (None,),
    ) -> None:
        """Allocates what steps of any length need.

        Args:
            max_batch: Sequences of a step at most.
            num_q_heads: A multiple of num_kv_heads.
            num_kv_heads: Heads of keys, and of values.
            head_dim: Elements of a head.
            device: Where the cache is.
            windows: The windows of the model's layers in tokens, None for the whole sequence.

        Raises:
            ValueError: num_q_heads is no multiple of num_kv_heads, or a window holds no token.
        """
        if num_q_heads % num_kv_heads:
            raise ValueError(
                f"num_q_heads {num_q_heads} must be a multiple of num_kv_heads {num_kv_heads}"
            )
        limits = [ALL_TOKENS if window is None else window for window in windows]
        if min(limits) < 1:
            raise ValueError(f"windows {windows} must hold a token each; None is no limit")
        self.max_batch = max_batch
        self.num_q_heads = num_q_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.num_programs = max(1, _resident_programs(device) // num_kv_heads)
        self.num_seqs = 0
        slots = (2 * self.num_programs, num_kv_heads, num_q_heads // num_kv_heads)
        self.partials = torch.empty(*slots, head_dim, device=device)
        self.partial_lses = torch.empty(slots, device=device)
        self.arrivals = torch.zeros(max_batch, num_kv_heads, dtype=torch.int32, device=device)
        self._limits = torch.tensor(limits, dtype=torch.int32, device=device)
        size = 1 + self.num_programs + max_batch + 1
        aligned = triton.cdiv(size, 4) * 4  # schedules begin at multiples of 16 bytes
        self._schedules = torch.zeros(len(limits), aligned, dtype=torch.int32, device=device)
        self._schedule_of = dict(zip(windows, self._schedules.unbind(), strict=True))

    def update(self, context_lens: torch.Tensor) -> None:
        """Shares out the tokens of a step, in one launch for all windows.

        Args:
            context_lens: [num_seqs] int32, tokens of each sequence in the cache, the new one
                included; 0 for a padding row. At least one row.

        Raises:
            ValueError: No sequence, or more than the plan has room for.
        """
        num_seqs = len(context_lens)
        if not 1 <= num_seqs <= self.max_batch:
            raise ValueError(f"{num_seqs} sequences: the plan was made for 1 to {self.max_batch}")
        self.num_seqs = num_seqs
        _launch(
            len(self._limits) * triton.cdiv(self.num_programs, _PROGRAM_BLOCK),
            (context_lens, self._limits, self._schedules),
            (num_seqs,),
            (
                self._schedules.stride(0),
                self.num_programs,
                TILE,
                triton.next_power_of_2(self.max_batch),
                _PROGRAM_BLOCK,
            ),
            num_warps=4,
        )

    def schedule(self, window: int | None) -> torch.Tensor:
        """The schedule of the layers with a window.

        Returns:
            [at least 1 + num_programs + max_batch + 1] int32: the tiles of a program; the
            sequence in which each program begins; the tiles before each sequence, then of all.

        Raises:
            ValueError: The plan was not made for this window.
        """
        schedule = self._schedule_of.get(window)
        if schedule is None:
            raise ValueError(f"window {window}: the plan was made for {list(self._schedule_of)}")
        return schedule


def _resident_programs(device: torch.device) -> int:
    """Programs that run at the same time."""
    if device.type != "cuda":
        return _PROGRAMS_WITHOUT_GPU
    return _PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["num_seqs"])
def _schedule_kernel(
    context_lens_ptr: tl.tensor,
    limits_ptr: tl.tensor,
    schedules_ptr: tl.tensor,
    num_seqs: tl.tensor,
    schedule_stride: tl.tensor,
    NUM_PROGRAMS: tl.constexpr,
    TILE: tl.constexpr,
    SEQS: tl.constexpr,
    PROGRAMS: tl.constexpr,
) -> None:
    """Writes where a block of programs begins, and the first block what all programs share."""
    row = tl.program_id(0) // tl.cdiv(NUM_PROGRAMS, PROGRAMS)
    block = tl.program_id(0) % tl.cdiv(NUM_PROGRAMS, PROGRAMS)
    seqs = tl.arange(0, SEQS)
    lengths = tl.load(context_lens_ptr + seqs, mask=seqs < num_seqs, other=0)
    ends = tl.cumsum(tl.cdiv(tl.minimum(lengths, tl.load(limits_ptr + row)), TILE), 0)
    share = tl.cdiv(tl.max(ends, 0), NUM_PROGRAMS)
    share_ptr = schedules_ptr + row * schedule_stride
    first_seqs_ptr = share_ptr + 1
    tile_starts_ptr = first_seqs_ptr + NUM_PROGRAMS
    if block == 0:
        tl.store(share_ptr, share)
        tl.store(tile_starts_ptr, 0)
        tl.store(tile_starts_ptr + 1 + seqs, ends, mask=seqs < num_seqs)
    programs = block * PROGRAMS + tl.arange(0, PROGRAMS)
    is_before = ends[None, :] <= programs[:, None] * share  # [PROGRAMS, SEQS]
    # Programs without work get a sequence too, which they may read about.
    first_seqs = tl.minimum(tl.sum(is_before.to(tl.int32), 1), num_seqs - 1)
    tl.store(first_seqs_ptr + programs, first_seqs, mask=programs < NUM_PROGRAMS)


_launch = Launcher(_schedule_kernel)
