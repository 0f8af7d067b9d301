"""Launches of Triton kernels that cost the host less than half of Triton's own.

A launch through Triton looks at each argument in Python to find the compiled form that fits it.
Without a CUDA graph that is what a prompt's step waits for, several times a layer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from triton.runtime import JITFunction, driver


@functools.cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel on a device can start before the one before it has ended.

    Programmatic dependent launch (CUDA C++ Programming Guide) came with compute capability 9.
    """
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


class Launcher:
    """A kernel and its compiled forms.

    The kernel's parameters are tensors, then counts (each named in its `do_not_specialize`), then
    what is fixed: a form is compiled for the types of the tensors and the values of what is fixed,
    and for tensors that begin at multiples of 16 bytes. For others, and in Triton's interpreter,
    each launch is Triton's own. Triton's launch hooks are not called.

    How a form is launched is no public interface of Triton's. Where a release does it in another
    way, its own launch takes over: slower, and the same.
    """

    __slots__ = ("_forms", "_is_direct", "_kernel")

    def __init__(self, kernel: Any) -> None:
        """Takes a function decorated with `triton.jit`."""
        self._kernel = kernel
        self._is_direct = isinstance(kernel, JITFunction)
        self._forms: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        num_programs: int,
        tensors: tuple[torch.Tensor | None, ...],
        counts: tuple[int, ...],
        fixed: tuple[int | float | str | None, ...],
        num_warps: int,
    ) -> None:
        """Launches on the current device, which must be the tensors', and its current stream.

        Args:
            num_programs: At least 1.
            tensors: The kernel's first arguments.
            counts: Numbers that vary from call to call, below 2**31.
            fixed: Numbers that seldom do, each always of one type, and compile-time constants.
            num_warps: Of a program.
        """
        arguments = *tensors, *counts, *fixed
        key = self._key(tensors, fixed, num_warps) if self._is_direct else None
        form = None if key is None else self._forms.get(key)
        if key is not None and form is not None:
            try:
                run, function, metadata = form
                stream = driver.active.get_current_stream(key[0])
                run(num_programs, 1, 1, stream, function, metadata, None, None, None, *arguments)
                return
            except (AttributeError, TypeError):  # another interface: nothing has been launched
                self._is_direct = False
        compiled = self._kernel[(num_programs,)](*arguments, num_warps=num_warps)
        if key is not None:
            self._keep(key, compiled)

    def _key(
        self,
        tensors: tuple[torch.Tensor | None, ...],
        fixed: tuple[int | float | str | None, ...],
        num_warps: int,
    ) -> tuple[Any, ...] | None:
        """What a form is compiled for, the device first; None where Triton has to look itself."""
        dtypes: list[torch.dtype | None] = []
        addresses = 0
        for tensor in tensors:
            if tensor is None:
                dtypes.append(None)
            else:
                dtypes.append(tensor.dtype)
                addresses |= tensor.data_ptr()
        if addresses % 16:
            return None
        return driver.active.get_current_device(), num_warps, fixed, *dtypes

    def _keep(self, key: tuple[Any, ...], compiled: Any) -> None:
        try:
            self._forms[key] = compiled.run, compiled.function, compiled.packed_metadata
        except AttributeError:
            self._is_direct = False
