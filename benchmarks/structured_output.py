"""How many JSON outputs of 200 schemas are valid and complete, and how fast bad ones are refused.

    python benchmarks/structured_output.py

The demo model writes one output of at most 512 tokens for each schema of `json_schemas.py`, at
temperature 0 and 1. Outputs that end by themselves must be JSON of their schema, as the
`jsonschema` package sees it. *Jumps* are the share of tokens that no step was spent on, since they
had to follow. *Refusals* are those of `hostile_grammars.py`, each with a checking process that is
ready: on a machine that has nothing else to do.

Writes `benchmarks/results/structured_output.json` and exits with 1 where a bound is missed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import torch
from engine_runs import Check, argument_parser, model_folder, report
from hostile_grammars import HOSTILE_GRAMMARS
from json_schemas import json_schemas
from mini_infer import EngineConfig, LLMEngine, MiniInferError, SamplingParams, StructuredOutput
from mini_infer.structured_output import Grammar, GrammarKind
from mini_infer_tokenizer.grammar_checks import GrammarChecks

VALID_BOUND = 1.0
"""Share of the complete outputs that are valid."""
COMPLETE_BOUND = 0.95
"""Share of the outputs that are complete within `MAX_TOKENS`."""
REFUSAL_BOUND_MS = 100.0
"""The slowest refusal."""
MAX_TOKENS = 512
NUM_SCHEMAS = 200
PROMPT = "Once upon a time there was"


def is_valid(text: str, schema: Any) -> bool:
    """Whether a text is JSON of a schema."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return False
    return jsonschema.Draft202012Validator(schema).is_valid(value)


def write_outputs(engine: LLMEngine, schemas: Sequence[Any], temperature: float) -> dict[str, Any]:
    """One output for each schema, all at once."""
    params = [
        SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=MAX_TOKENS,
            structured_output=StructuredOutput(json_schema=json.dumps(schema)),
        )
        for seed, schema in enumerate(schemas)
    ]
    started = time.perf_counter()
    outputs = engine.generate([PROMPT] * len(schemas), params)
    seconds = time.perf_counter() - started
    reasons = Counter(output.finish_reason for output in outputs)
    complete = [
        each for each in zip(outputs, schemas, strict=True) if each[0].finish_reason == "stop"
    ]
    return {
        "temperature": temperature,
        "finish_reasons": dict(reasons),
        "complete": len(complete) / len(outputs),
        "valid": sum(is_valid(output.text, schema) for output, schema in complete) / len(complete),
        "tokens": sum(len(output.token_ids) for output in outputs),
        "seconds": seconds,
    }


def jump_share(engine: LLMEngine, schemas: Sequence[Any]) -> float:
    """Share of an output's tokens that need no step, over outputs made one at a time."""
    num_tokens, first_step = 0, engine.num_steps
    for schema in schemas:
        structured = StructuredOutput(json_schema=json.dumps(schema))
        (output,) = engine.generate(PROMPT, max_tokens=MAX_TOKENS, structured_output=structured)
        num_tokens += len(output.token_ids)
    return 1 - (engine.num_steps - first_step) / num_tokens


def refusal_times(model: str) -> list[float]:
    """Seconds until each hostile language is refused; those that are accepted are left out."""
    checks = GrammarChecks(Path(model), num_processes=1)
    seconds = []
    for number, (_, grammar) in enumerate(HOSTILE_GRAMMARS):
        checks.check(Grammar(GrammarKind.REGEX, f"[a-z]+{number}"))  # behind it, one is ready
        started = time.perf_counter()
        try:
            checks.check(grammar)
        except MiniInferError:
            seconds.append(time.perf_counter() - started)
    checks.close()
    return seconds


def main() -> int:
    """Runs both temperatures; the exit status tells whether the bounds were kept."""
    arguments = argument_parser(__doc__).parse_args()
    schemas = json_schemas(20 if arguments.quick else NUM_SCHEMAS)
    with model_folder(arguments) as model:
        config = EngineConfig(model=model, device=arguments.device, max_num_seqs=64)
        with LLMEngine(config) as engine:
            cases = [write_outputs(engine, schemas, temperature) for temperature in (0.0, 1.0)]
            jumps = jump_share(engine, schemas[:20])
        refusals_ms = sorted(1e3 * seconds for seconds in refusal_times(model))
    checks = []
    for case in cases:
        name = f"at temperature {case['temperature']:g}"
        checks.append(
            Check(name=f"complete outputs {name}", value=case["complete"], least=COMPLETE_BOUND)
        )
        checks.append(
            Check(name=f"valid ones of them {name}", value=case["valid"], least=VALID_BOUND)
        )
    checks.append(Check(name="tokens without a step, one output at a time", value=jumps))
    checks.append(Check(name="slowest refusal, ms", value=refusals_ms[-1], most=REFUSAL_BOUND_MS))
    cases.append({"refusals": len(refusals_ms), "median_ms": statistics.median(refusals_ms)})
    device = torch.device(arguments.device)
    return report("structured_output", arguments, device, cases, checks)


if __name__ == "__main__":
    sys.exit(main())
