"""A kernel beside the same operation in plain torch, eager and compiled: one case of a report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Report, cold, eager_timing, host_us

NUM_ROWS = (1, 64, 512, 8192, 65_536)

Operation = Callable[..., object]
MakeInputs = Callable[[], tuple[Any, ...]]


def random(*shape: int) -> torch.Tensor:
    """Normal bfloat16 numbers on the GPU."""
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def add_case(
    report: Report,
    ours: Operation,
    theirs: Operation,
    make_inputs: MakeInputs,
    num_bytes: int,
    **case: Any,
) -> None:
    """Measures and adds a case: device times of cold inputs, eager torch with its launches.

    Args:
        report: Gets the case.
        ours: The kernel's wrapper.
        theirs: The same in plain torch.
        make_inputs: Makes the arguments of a call of either, its own each time.
        num_bytes: What a call reads and writes, each byte once.
        case: What names the case.
    """
    inputs = make_inputs()
    ours_us = _cold_us(ours, make_inputs, num_bytes)
    floor_us = report.floor_us(num_bytes)
    report.add(
        **case,
        ours_us=ours_us,
        eager_us=eager_timing(lambda: theirs(*inputs)).median_us,
        compiled_us=_compiled_us(theirs, make_inputs, num_bytes),
        floor_us=floor_us,
        share_of_floor=floor_us / ours_us,
        # The least of some, since other processes share the host.
        host_us=min(host_us(lambda: ours(*inputs)) for _ in range(5)),
    )


def print_table(report: Report) -> None:
    """Prints the cases, a line each."""
    for case in report.cases:
        print("  ".join(f"{name}={value}" for name, value in case.items()))


def _cold_us(operation: Operation, make_inputs: MakeInputs, num_bytes: int) -> float:
    def make_call() -> Callable[[], object]:
        inputs = make_inputs()
        return lambda: operation(*inputs)

    return cold(make_call, num_bytes).median_us


def _compiled_us(operation: Operation, make_inputs: MakeInputs, num_bytes: int) -> float | str:
    """Microseconds of the operation through torch.compile, or why there are none."""
    torch.compiler.reset()  # it gives up after some shapes
    try:
        return _cold_us(torch.compile(operation, dynamic=False), make_inputs, num_bytes)
    except Exception as error:  # for want of a C compiler, for one
        return f"not compiled: {type(error).__name__}"
