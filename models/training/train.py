"""Trains one of the shipped models from scratch on the generated corpus.

    python models/training/train.py --model demo --device cuda --compile

The corpus is generated and encoded first, then windows that begin at random documents are drawn
with a seeded generator; the same command gives the same model up to the order of floating-point
sums. Writes the checkpoint and `training.json` (the figures) into the output folder.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint import MODELS_DIR, load_checkpoint, save_checkpoint, write_json
from corpus import NUM_HELD_OUT_DOCUMENTS, NUM_TRAINING_DOCUMENTS, TokenStream, encode_corpus
from llama import SHAPES, Llama
from scoring import score_stream
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
MAX_GRADIENT_NORM = 1.0
FINAL_RATE_SHARE = 0.02
REPORT_STEPS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """What to train and how; counts are of steps, documents, sequences and tokens."""

    model: str
    steps: int
    batch_sequences: int
    context_tokens: int
    learning_rate: float
    warmup_steps: int
    seed: int
    documents: int
    held_out_documents: int
    device: str
    use_compile: bool
    processes: int

    def learning_rate_at(self, step: int) -> float:
        """Returns the rate of a step: linear warm-up, then a cosine."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * warm * (FINAL_RATE_SHARE + (1 - FINAL_RATE_SHARE) * cosine)


def draw_batches(stream: TokenStream, config: TrainingConfig) -> Iterator[Tensor]:
    """Yields the batches of all steps.

    Args:
        stream: The encoded training documents.
        config: Sizes and seed.

    Yields:
        `[batch_sequences, context_tokens + 1]`, int64, on the device; each row begins at the
        first token of a random document and runs on through the documents after it.
    """
    rng = np.random.default_rng(config.seed)
    width = config.context_tokens + 1
    last_start = len(stream.token_ids) - width
    starts = stream.document_starts[stream.document_starts <= last_start]
    tokens = torch.from_numpy(stream.token_ids.astype(np.int32)).to(config.device)
    columns = torch.arange(width, device=config.device)
    for _ in range(config.steps):
        rows = torch.from_numpy(rng.choice(starts, config.batch_sequences)).to(config.device)
        yield tokens[rows[:, None] + columns].long()


def make_optimizer(model: Llama, config: TrainingConfig) -> torch.optim.AdamW:
    """Returns AdamW with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    is_cuda = config.device.startswith("cuda")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS, fused=is_cuda)


def train(model: Llama, stream: TokenStream, config: TrainingConfig) -> None:
    """Trains `model` in place, in bfloat16 autocast on CUDA and fp32 elsewhere."""
    device_type = torch.device(config.device).type
    optimizer = make_optimizer(model, config)
    forward = torch.compile(model) if config.use_compile else model
    started_s = time.perf_counter()
    for step, batch in enumerate(draw_batches(stream, config)):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        with torch.autocast(device_type, torch.bfloat16, enabled=device_type == "cuda"):
            logits = forward(batch[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % REPORT_STEPS == 0 or step + 1 == config.steps:
            elapsed_s = time.perf_counter() - started_s
            print(f"step {step:5d}  loss {loss.item():.4f}  {elapsed_s:6.1f} s", flush=True)


def parse_arguments() -> tuple[TrainingConfig, Path]:
    """Returns the configuration and the output folder of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(SHAPES), default="demo")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-sequences", type=int, default=128)
    parser.add_argument("--context-tokens", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--documents", type=int, default=NUM_TRAINING_DOCUMENTS)
    parser.add_argument("--held-out-documents", type=int, default=NUM_HELD_OUT_DOCUMENTS)
    parser.add_argument("--device", default="cpu", help="any torch device")
    parser.add_argument("--compile", dest="use_compile", action="store_true")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="default: the folder of the model")
    options = vars(parser.parse_args())
    output = options.pop("output") or MODELS_DIR / options["model"]
    return TrainingConfig(**options), output


def main() -> None:
    """Generates the corpus, trains, saves, and scores what was saved."""
    config, output = parse_arguments()
    started_s = time.perf_counter()
    tokenizer = Tokenizer.from_file(str(MODELS_DIR / config.model / "tokenizer.json"))
    stream = encode_corpus(tokenizer, config.documents, config.processes)
    held_out = encode_corpus(tokenizer, config.held_out_documents, config.processes, held_out=True)
    corpus_s = time.perf_counter() - started_s
    print(f"{len(stream.token_ids)} training tokens in {corpus_s:.1f} s", flush=True)

    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    model = Llama(SHAPES[config.model]).to(config.device)
    train(model, stream, config)
    training_s = time.perf_counter() - started_s - corpus_s
    save_checkpoint(model, output)

    scores = score_stream(load_checkpoint(output, config.device), held_out)
    figures: dict[str, Any] = {
        "config": asdict(config),
        "num_parameters": model.num_parameters(),
        "corpus_tokens": len(stream.token_ids),
        "trained_tokens": config.steps * config.batch_sequences * config.context_tokens,
        "corpus_s": round(corpus_s, 1),
        "training_s": round(training_s, 1),
        "held_out_tokens": len(scores.losses),
        "held_out_perplexity": round(scores.perplexity, 5),
    }
    write_json(output / "training.json", figures)
    print(figures)


if __name__ == "__main__":
    main()
