"""This engine and vLLM side by side on one GPU: the same shapes and requests, in turns.

Each engine lives in a process of its own with 45 % of the GPU's memory, weights drawn at random,
greedy decoding to the full length, prefix cache off. They run A-B-A-B after a warm-up each, so
that clocks and neighbours are the same for both. Prints a line of JSON a case with both medians
and their ratio, and writes `benchmarks/results/compare_with_vllm.json`. Needs vLLM:

    pip install vllm
    python benchmarks/compare_with_vllm.py --shape llama3-8b

Where vLLM is not installed it says so, with the figures that are known of it, and exits with 2.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from engine_marks import LATENCY, THROUGHPUT, Load

MEMORY_SHARE = 0.45
ENGINES = ("mini-infer", "vllm")
ONE_STREAM = Load(1, 128, 256)


def main() -> int:
    """Compares what the command line names, or serves one engine to a comparison."""
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
        return 0
    from gpu_runs import make_parser, print_ceilings, write_results

    options = make_parser(__doc__.splitlines()[0]).parse_args()
    if importlib.util.find_spec("vllm") is None:
        print("vllm is not installed: pip install vllm. What is known of it:", file=sys.stderr)
        for shape in options.shape:
            print(json.dumps(known_figures(shape)))
        return 2
    ceilings = print_ceilings(options.shape)
    cases = []
    for shape in options.shape:
        for case in compare(shape, options):
            cases.append(case)
            print(json.dumps(case), flush=True)
    write_results("compare_with_vllm", options.results, ceilings, cases)
    return 0


def known_figures(shape: str) -> dict[str, Any]:
    """What vLLM 0.26.0 reached on an H200."""
    rates = {
        "/".join(map(str, load)): mark.tokens_per_s for load, mark in THROUGHPUT[shape].items()
    }
    return {"shape": shape, "tokens_per_s": rates, **LATENCY[shape]._asdict()}


def compare(shape: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases of a shape."""
    from model_shapes import write_model_folder

    with tempfile.TemporaryDirectory() as folder:
        write_model_folder(Path(folder), shape)
        servers = {engine: Server(engine, shape, Path(folder)) for engine in ENGINES}
        try:
            loads = [ONE_STREAM, *THROUGHPUT[shape]]
            return [compare_load(servers, shape, load, options.runs) for load in loads]
        finally:
            for server in servers.values():
                server.close()


def compare_load(
    servers: dict[str, Server], shape: str, load: Load, num_runs: int
) -> dict[str, Any]:
    """One case: a warm-up of each engine, then runs in turns."""
    seconds: dict[str, list[float]] = {engine: [] for engine in servers}
    for run in range(num_runs + 1):
        for engine, server in servers.items():
            elapsed = server.run(load, seed=run)
            if run:
                seconds[engine].append(elapsed)
    num_tokens = load.num_requests * load.output_len
    rates = {engine: num_tokens / statistics.median(each) for engine, each in seconds.items()}
    return {
        "shape": shape,
        **load._asdict(),
        **{f"{engine}_tokens_per_s": round(rate) for engine, rate in rates.items()},
        "seconds": {name: [round(each, 4) for each in times] for name, times in seconds.items()},
        "ratio": round(rates["mini-infer"] / rates["vllm"], 3),
    }


class Server:
    """One engine in a process of its own; a line of JSON in, a line out."""

    def __init__(self, engine: str, shape: str, folder: Path) -> None:
        """Starts the process and waits until its engine is loaded."""
        command = [sys.executable, __file__, "--serve", engine, shape, str(folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def run(self, load: Load, seed: int) -> float:
        """Seconds for a load."""
        stdin: IO[str] = self._process.stdin  # type: ignore[assignment]
        stdin.write(json.dumps([*load, seed]) + "\n")
        stdin.flush()
        return float(self._read())

    def close(self) -> None:
        """Ends the process."""
        self._process.terminate()
        self._process.wait()

    def _read(self) -> Any:
        """The next answer; engines print other lines as well.

        Raises:
            RuntimeError: The process ended.
        """
        stdout: IO[str] = self._process.stdout  # type: ignore[assignment]
        for line in stdout:
            if line.startswith(_ANSWER):
                return json.loads(line.removeprefix(_ANSWER))
        raise RuntimeError(f"an engine ended with code {self._process.wait()}: see its log above")


_ANSWER = "answer: "


def serve(engine: str, shape: str, folder: Path) -> None:
    """Loads an engine, then answers a load a line with its seconds."""
    from model_shapes import random_prompts

    config = json.loads((folder / "config.json").read_text())
    generate = {"mini-infer": load_ours, "vllm": load_vllm}[engine](shape, folder)
    print(_ANSWER + json.dumps("ready"), flush=True)
    for line in sys.stdin:
        num_requests, prompt_len, output_len, seed = json.loads(line)
        prompts = random_prompts(num_requests, prompt_len, config["vocab_size"], seed)
        started = time.perf_counter()
        lengths = set(generate(prompts, output_len))
        elapsed = time.perf_counter() - started
        assert lengths == {output_len}, f"outputs of {lengths} tokens"
        print(_ANSWER + json.dumps(elapsed), flush=True)


Generate = Callable[[list[list[int]], int], list[int]]
"""Prompts and tokens wanted, to the tokens of each output."""


def load_ours(shape: str, folder: Path) -> Generate:
    """This engine."""
    from gpu_runs import new_engine

    engine = new_engine(folder, shape, gpu_memory_utilization=MEMORY_SHARE)

    def generate(prompts: list[list[int]], output_len: int) -> list[int]:
        outputs = engine.generate(prompts, max_tokens=output_len, temperature=0.0, ignore_eos=True)
        return [len(output.token_ids) for output in outputs]

    return generate


def load_vllm(shape: str, folder: Path) -> Generate:
    """VLLM with its defaults, as far as the comparison leaves them."""
    from gpu_runs import MAX_MODEL_LEN, MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(folder),
        load_format="dummy",
        dtype="bfloat16",
        enable_prefix_caching=False,
        gpu_memory_utilization=MEMORY_SHARE,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
    )

    def generate(prompts: list[list[int]], output_len: int) -> list[int]:
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=output_len)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = engine.generate(inputs, params, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    return generate


if __name__ == "__main__":
    sys.exit(main())
