"""Launches of Triton kernels that cost the host less than half of Triton's own.

A launch through Triton looks at each argument in Python to find the compiled form that fits it.
Without a CUDA graph that is what a prompt's step waits for, several times a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime import JITFunction, driver


class Launcher:
    """A kernel and its compiled forms.

    The kernel's parameters are tensors, then counts (each named in its `do_not_specialize`), then
    what is fixed: a form is compiled for the types of the tensors and the values of what is fixed,
    and for tensors that begin at multiples of 16 bytes. For others, and in Triton's interpreter,
    each launch is Triton's own. Triton's launch hooks are not called.
    """

    __slots__ = ("_forms", "_is_compiled", "_kernel")

    def __init__(self, kernel: Any) -> None:
        """Takes a function decorated with `triton.jit`."""
        self._kernel = kernel
        self._is_compiled = isinstance(kernel, JITFunction)
        self._forms: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        num_programs: int,
        tensors: tuple[torch.Tensor | None, ...],
        counts: tuple[int, ...],
        fixed: tuple[int | float | str | None, ...],
        num_warps: int,
    ) -> None:
        """Launches on the current stream.

        Args:
            num_programs: At least 1.
            tensors: The kernel's first arguments.
            counts: Numbers that vary from call to call, below 2**31.
            fixed: Numbers that seldom do, each always of one type, and compile-time constants.
            num_warps: Of a program.
        """
        arguments = *tensors, *counts, *fixed
        dtypes: list[torch.dtype | None] = []
        addresses = 0
        for tensor in tensors:
            if tensor is None:
                dtypes.append(None)
            else:
                dtypes.append(tensor.dtype)
                addresses |= tensor.data_ptr()
        if not self._is_compiled or addresses % 16:
            self._kernel[(num_programs,)](*arguments, num_warps=num_warps)
            return
        device = driver.active.get_current_device()
        key = device, num_warps, fixed, *dtypes
        form = self._forms.get(key)
        if form is None:
            form = self._kernel[(num_programs,)](*arguments, num_warps=num_warps)
            self._forms[key] = form.run, form.function, form.packed_metadata
            return
        run, function, metadata = form
        stream = driver.active.get_current_stream(device)
        run(num_programs, 1, 1, stream, function, metadata, None, None, None, *arguments)
