"""Work of the same kernels at each step, captured as CUDA graphs: one launch for all of them.

A kernel of a decoding step takes microseconds, and to launch it from Python takes several.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

GraphPool = Any
"""Memory that graphs share, as torch hands it out."""


class GraphsBySize:
    """A graph for each number of rows."""

    def __init__(self) -> None:
        """Begins without any."""
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def replay(self, size: int) -> bool:
        """Queues the work for so many rows; tells whether that is captured."""
        graph = self._graphs.get(size)
        if graph is not None:
            graph.replay()
        return graph is not None

    def capture(self, sizes: Sequence[int], run: Callable[[int], None]) -> None:
        """Captures some work for these numbers of rows.

        Args:
            sizes: Numbers of rows.
            run: Launches the work for so many rows. It reads and writes the same memory each time.
                It must have run for each of them before: what is compiled at first use cannot be
                captured.
        """
        gc.collect()  # what a collection frees while a graph is captured would end the capture
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # The largest first: the smaller ones make do with the memory that it has taken.
        for size in sorted(sizes, reverse=True):
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                run(size)
            self._graphs[size] = graph

    def release(self) -> None:
        """Forgets all of them."""
        self._graphs.clear()


def borrowed(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements, without holding their memory: for graphs that fill it at each replay."""
    view = torch.as_tensor(_BorrowedArray(tensor), device=tensor.device)
    assert view.data_ptr() == tensor.data_ptr(), "torch has copied what it should have looked at"
    return view.view(tensor.dtype)


class _BorrowedArray:
    """Memory of a CUDA device as integers of the elements' size, of which there are all."""

    def __init__(self, tensor: torch.Tensor) -> None:
        itemsize = tensor.element_size()
        self.__cuda_array_interface__ = {
            "version": 3,
            "typestr": f"<i{itemsize}",
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "strides": tuple(itemsize * stride for stride in tensor.stride()),
        }
