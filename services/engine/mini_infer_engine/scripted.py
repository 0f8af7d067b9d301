"""An engine whose tokens are a formula: everything but the model is the real thing.

It speaks the same wire through the same loop, scheduler and block pool, takes as long for a step
as it is told, and can make several tokens a row and step. Tests and measurements of whatever
stands before the engine use it, since what it must deliver is known in advance. No torch.

    python -m mini_infer_engine.scripted --address ipc:///run/engine.sock --step-ms 50
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from mini_infer.config import EngineConfig
from mini_infer.errors import ConfigError
from mini_infer.model_folder import MAX_TOKENIZER_BYTES, TOKENIZER_FILE, read_json_object

from mini_infer_engine.batch import (
    NO_TOKENS,
    FillMasks,
    LaunchedTokens,
    ScheduledBatch,
    StepTokens,
    fill_no_masks,
)
from mini_infer_engine.build_scheduler import build_scheduler
from mini_infer_engine.model_config import read_model_config
from mini_infer_engine.served_model import read_served_model
from mini_infer_engine.server import serve
from mini_infer_engine.step_costs import StepCoefficients


def scripted_token(seed: int, position: int, ordinary_ids: list[int]) -> int:
    """The token that the scripted engine makes.

    Args:
        seed: Of the request.
        position: Output position.
        ordinary_ids: Ids to choose from (see `ordinary_token_ids`).
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03) % 2**64
    return ordinary_ids[(mixed >> 24) % len(ordinary_ids)]


def ordinary_token_ids(folder: Path) -> list[int]:
    """Ids of a model's vocabulary that are not special tokens, in order."""
    tokenizer = read_json_object(folder / TOKENIZER_FILE, MAX_TOKENIZER_BYTES)
    added, model = tokenizer.get("added_tokens"), tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(added, list) or not isinstance(vocabulary, dict):
        raise ConfigError(f"{folder}/tokenizer.json: expected a vocabulary of tokens and ids")
    special = {each["id"] for each in added}
    return sorted(each for each in vocabulary.values() if each not in special)


class ScriptedRunner:
    """Makes `scripted_token`s, a fixed number a row, each step taking the same time.

    Attributes:
        runs_ahead: Where a row gets one token a step, since no token depends on another.
    """

    def __init__(self, ordinary_ids: list[int], step_s: float, tokens_per_row: int) -> None:
        """Makes a runner.

        Args:
            ordinary_ids: Ids to choose from.
            step_s: Seconds that a step takes.
            tokens_per_row: Tokens of a row and step, at least 1.
        """
        self._ordinary_ids = ordinary_ids
        self._step_s = step_s
        self._tokens_per_row = tokens_per_row
        self.runs_ahead = tokens_per_row == 1

    def launch(
        self, batch: ScheduledBatch, fill_masks: FillMasks = fill_no_masks
    ) -> LaunchedTokens:
        """A step that waits for its time and gives its tokens, whatever the rows ask for."""
        return partial(self._run, batch)

    def _run(self, batch: ScheduledBatch) -> StepTokens:
        if batch.is_empty:
            return NO_TOKENS
        time.sleep(self._step_s)
        columns = batch.sampling
        token_ids = [
            scripted_token(seed, position + offset, self._ordinary_ids)
            for seed, position in zip(
                columns.seeds.tolist(), columns.positions.tolist(), strict=True
            )
            for offset in range(self._tokens_per_row)
        ]
        num_rows = len(columns.rows)
        return StepTokens(
            np.array(token_ids, np.int64).reshape(num_rows, self._tokens_per_row),
            np.zeros(num_rows, np.int32),
        )


def main(
    address: Annotated[str, typer.Option(help="Where to listen for gateways, ipc://.")],
    model: Annotated[str, typer.Option(help="Model folder; empty means the demo model.")] = "",
    step_ms: Annotated[float, typer.Option(help="Milliseconds that a step takes.")] = 1.0,
    tokens_per_row: Annotated[
        int, typer.Option(min=1, max=16, help="Tokens of a row and step.")
    ] = 1,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences in a step at most.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens in a step.")] = 8192,
    num_blocks: Annotated[int, typer.Option(help="Blocks of 16 tokens.")] = 65536,
    max_queued_requests: Annotated[int, typer.Option(help="Requests that may wait.")] = 4096,
) -> None:
    """Serves gateways with tokens made by a formula."""
    config = EngineConfig(
        model=model,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_queued_requests=max_queued_requests,
    )
    model_config = read_model_config(config.model_folder)
    served = read_served_model(config, model_config, "float32")
    ordinary_ids = ordinary_token_ids(config.model_folder)
    runner = ScriptedRunner(ordinary_ids, step_ms / 1e3, tokens_per_row)
    step_s = max(step_ms / 1e3, 1e-6)
    # The time of a step does not depend on what is in it.
    costs = StepCoefficients(
        step_s=step_s, row_s=1e-9, context_s=1e-12, token_s=1e-9, pair_s=1e-12, block_s=1e-9
    )
    scheduler = build_scheduler(config, num_blocks=num_blocks, num_host_blocks=0, costs=costs)
    serve(served, scheduler, runner, address, seconds_per_token=step_s)


if __name__ == "__main__":
    typer.run(main)
