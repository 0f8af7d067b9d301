"""What the engine's benchmarks on a GPU share: options, ceilings, an engine of a shape, results."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engine_marks
import torch
from gpu_ceilings import measure_ceilings
from machine import environment
from mini_infer import EngineConfig, LLMEngine
from model_shapes import SHAPE_NAMES, random_prompts, write_model_folder
from random_checkpoint import SHAPES

RESULTS = Path(__file__).parent / "results"
MAX_NUM_SEQS = 256
MAX_NUM_BATCHED_TOKENS = 8192
MAX_MODEL_LEN = 4096
_CEILING_TOLERANCE = 0.03


def make_parser(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shape", nargs="+", choices=SHAPE_NAMES, default=list(SHAPE_NAMES))
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each case")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    return parser


@contextmanager
def engine_of(shape: str, **options: Any) -> Iterator[LLMEngine]:
    """An engine of a shape, with weights drawn on the GPU.

    Args:
        shape: One of `SHAPE_NAMES`.
        **options: As `new_engine`.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_model_folder(Path(folder), shape)
        with new_engine(Path(folder), shape, **options) as engine:
            yield engine


def new_engine(folder: Path, shape: str, **options: Any) -> LLMEngine:
    """An engine of a model folder without weights, which are drawn on the GPU.

    Args:
        folder: As `write_model_folder` writes it.
        shape: Its name.
        **options: Fields of `EngineConfig` in place of those of the comparison.
    """
    fields: dict[str, Any] = {
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
        "max_model_len": MAX_MODEL_LEN,
        "enable_prefix_caching": False,
        "swap_space_gib": 0,
        **options,
    }
    return LLMEngine(
        EngineConfig(
            model=str(folder),
            served_model_name=shape,
            device="cuda",
            load_format="dummy",
            **fields,
        )
    )


def timed_generate(engine: LLMEngine, shape: str, load: engine_marks.Load, seed: int) -> float:
    """Seconds for requests of equal lengths, greedy, to their full length.

    Raises:
        AssertionError: An output has another number of tokens.
    """
    prompts = random_prompts(load.num_requests, load.prompt_len, SHAPES[shape]["vocab_size"], seed)
    torch.cuda.synchronize()
    started = time.perf_counter()
    outputs = engine.generate(prompts, max_tokens=load.output_len, temperature=0.0, ignore_eos=True)
    elapsed = time.perf_counter() - started
    lengths = {len(output.token_ids) for output in outputs}
    assert lengths == {load.output_len}, f"outputs of {lengths} tokens"
    return elapsed


def print_ceilings(shapes: Sequence[str]) -> dict[str, Any]:
    """Measures what the GPU can do, and prints it with what it was when the marks were taken."""
    ceilings = measure_ceilings({name: SHAPES[name] for name in shapes})
    print(json.dumps({"ceilings": ceilings}), flush=True)
    if engine_marks.GPU in torch.cuda.get_device_name():
        for line in _differences(ceilings):
            print(line, flush=True)
    return ceilings


def write_results(name: str, folder: Path, ceilings: dict[str, Any], cases: list[Any]) -> None:
    """Writes `<name>.json` with the machine, the versions and the date."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        **environment("torch", "triton"),
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "ceilings": ceilings,
        "cases": cases,
    }
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def _differences(ceilings: dict[str, Any]) -> Iterator[str]:
    """A line for each limit that is not what it was."""
    pairs = [
        ("copy, TB/s", ceilings["copy_tb_s"], engine_marks.COPY_TB_S),
        ("matmul, TFLOP/s", ceilings["matmul_tflop_s"], engine_marks.MATMUL_TFLOP_S),
    ]
    for shape, known in engine_marks.CUBLAS_STEP_MS.items():
        measured = ceilings["cublas_step_ms"].get(shape, {})
        pairs += [
            (f"cuBLAS step of {shape}, {rows} rows, ms", measured[rows], known[rows])
            for rows in known
            if rows in measured
        ]
    for what, measured, known in pairs:
        if abs(measured / known - 1) > _CEILING_TOLERANCE:
            yield f"differs from the machine of the marks: {what}: {measured} here, {known} there"
