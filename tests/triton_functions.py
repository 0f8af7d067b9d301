"""Where tests run Triton's functions: on a GPU if there is one, otherwise in its interpreter."""

from __future__ import annotations

import os
from functools import cache

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare_triton() -> None:
    """Call it before kernels are imported: importing them settles how they run."""
    if DEVICE.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    triton = pytest.importorskip("triton")
    if DEVICE.type == "cpu" and isinstance(triton.language.philox, triton.runtime.JITFunction):
        raise RuntimeError("triton was imported too early: run pytest with TRITON_INTERPRET=1")
    if DEVICE.type == "cpu":
        _allow_ranges_of_tensors()


@cache
def _allow_ranges_of_tensors() -> None:
    """Lets the interpreter of Triton 3.6 take the bounds of a range from tensors.

    It makes them integers by way of arrays of one element, which NumPy 2.4 refuses.
    """
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: type, scope: interpreter._LangPatchScope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch
