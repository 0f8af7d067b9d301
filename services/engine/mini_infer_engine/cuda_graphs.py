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

    def __init__(self, run: Callable[[int], None]) -> None:
        """Takes the work; it is run as it is until `capture`.

        Args:
            run: Launches the work for so many rows. It reads and writes the same memory each time.
        """
        self._run = run
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def run(self, size: int) -> None:
        """Queues the work for so many rows."""
        graph = self._graphs.get(size)
        if graph is None:
            self._run(size)
        else:
            graph.replay()

    def capture(self, sizes: Sequence[int]) -> None:
        """Captures the work for these numbers of rows; it is run once for each as well."""
        gc.collect()  # what a collection frees while a graph is captured would end the capture
        pool = torch.cuda.graph_pool_handle()
        # The largest first: the smaller ones make do with the memory that it has taken.
        for size in sorted(sizes, reverse=True):
            self._run(size)  # compiles what is compiled at first use
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._run(size)
            self._graphs[size] = graph
