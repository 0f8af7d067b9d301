"""One sample of every message, and `python tests/message_samples.py`, which records frames.

Recorded frames stand for processes of older versions: they are added to, never written anew.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from mini_infer import messages
from mini_infer.errors import ErrorReason
from mini_infer.logprobs import LogprobColumns
from mini_infer.resolved_sampling import GenerationDefaults, RepetitionLimit, ResolvedSampling
from mini_infer.structured_output import Grammar, GrammarKind

FRAMES = Path(__file__).parent / "common" / "frames"

DECODERS = {
    "to_engine": messages.to_engine_decoder,
    "from_engine": messages.from_engine_decoder,
    "to_tokenizer": messages.to_tokenizer_decoder,
    "from_tokenizer": messages.from_tokenizer_decoder,
}

_GREETINGS = (
    messages.HelloRefused("this gateway speaks version 2, this engine version 1"),
    messages.HelloNeeded(),
)
_FROM_GATEWAY = (
    messages.Hello(1, "gateway-17-0a1b2c3d4e5f6071"),
    messages.GatewayBeat([1, 2**32 - 1]),
)
_GRAMMAR = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object"}')
_SAMPLING = ResolvedSampling(0.7, 40, 0.9, 2**64 - 1, 128, 4, True, [7, 9])
_FULL_SAMPLING = msgspec.structs.replace(
    _SAMPLING,
    min_p=0.05,
    typical_p=0.95,
    repetition_penalty=1.25,
    presence_penalty=-0.5,
    frequency_penalty=0.5,
    bias_ids=[0, 4095],
    bias_values=[-100.0, 1.5],
    allowed_token_ids=[1, 2, 3],
    bad_words=[[7], [8, 9]],
    num_logprobs=2,
    num_prompt_logprobs=0,
    repetition=RepetitionLimit(1, 64, 4),
    grammar=_GRAMMAR,
)
_LOGPROBS = LogprobColumns.from_arrays(
    np.array([-0.5, -2.25]),
    np.array([1, 3]),
    np.array([[100, 7], [8, 9]]),
    np.array([[-0.5, -1.5], [-0.25, -np.inf]]),
)

SAMPLES: dict[str, tuple[messages.Message, ...]] = {
    "to_engine": (
        *_FROM_GATEWAY,
        messages.Submit(5, [1, 2, 3], [4], _SAMPLING, 30_000, -7, "ann", "salt", [6, 2**32 - 1]),
        messages.Submit(5, [1, 2, 3], [], _FULL_SAMPLING),
        messages.Abort([5, 6], True),
    ),
    "from_engine": (
        *_GREETINGS,
        messages.EngineWelcome(
            1,
            "engine-18",
            1_700_000_000_000_000_000,
            "demo",
            "LlamaForCausalLM",
            "float32",
            "f" * 64,
            "a" * 64,
            4096,
            4096,
            [2],
            GenerationDefaults(0.7, 50, 0.95, 256, 0.05, 0.9, 1.25),
            1024,
            16,
        ),
        messages.Accepted(5),
        messages.Refused(5, ErrorReason.KV_EXHAUSTED, "no room", {"limit": "64"}),
        messages.Refused(5, ErrorReason.DEADLINE_UNREACHABLE, "too late", {}, 2.5),
        messages.StepOutput(
            epoch=3,
            seq=9,
            step=41,
            streams=[5, 6],
            starts=[0, 12],
            counts=[2, 1],
            token_ids=[100, 101, 2],
            finish_codes=[messages.FinishCode.RUNNING, messages.FinishCode.STOP_TOKEN],
            stop_token_ids=[messages.NO_STOP_TOKEN, 2],
            finished=[messages.FinishAccounting(0.5, 3.25, 40.0, 16, 1, 13)],
        ),
        messages.StepOutput(
            epoch=3,
            seq=10,
            step=42,
            streams=[5, 6, 7],
            starts=[2, 0, 9],
            counts=[2, 1, 0],
            token_ids=[100, 8, 9],
            finish_codes=[
                messages.FinishCode.REPETITION,
                messages.FinishCode.RUNNING,
                messages.FinishCode.GRAMMAR,
            ],
            stop_token_ids=[messages.NO_STOP_TOKEN] * 3,
            finished=[messages.FinishAccounting(0.5, 3.25, 40.0, 16, 1, 13)] * 2,
            logprob_rows=[0],
            logprobs=[_LOGPROBS],
        ),
        messages.PromptLogprobs(3, 5, 1, _LOGPROBS),
        messages.EngineBeat(
            *(3, 41, 12.5, 2, 1, 9, 1, 4, 17),
            counters=messages.EngineCounters(
                *(900, 41, 600, 320, 1, 2, 12, 8, 3, 5, 1, 2), refusals={"KV_EXHAUSTED": 4}
            ),
        ),
    ),
    "to_tokenizer": (
        *_FROM_GATEWAY,
        messages.EncodeText(1, "Once upon a time", True),
        messages.EncodeChat(
            2,
            [
                messages.WireChatMessage("user", "Hi", name="Ann"),
                messages.WireChatMessage(
                    "assistant",
                    None,
                    tool_calls=[messages.WireToolCall("find", '{"x": 1}', True, "call-1")],
                    reasoning_content="Hm.",
                ),
                messages.WireChatMessage("tool", "a fox", tool_call_id="call-1"),
            ],
            False,
            ['{"name": "find"}'],
            ['{"title": "Foxes"}'],
            '{"enable_thinking": false}',
            "tool_use",
            True,
        ),
        messages.Decode(3, [1, 2, 3], False),
        messages.OpenText(5, ["\n\n", "END"], True, False, 4, [1], True),
        messages.TextStep([5], [0], [2], [100, 101], [True]),
        messages.CloseText([5]),
        messages.CancelJobs([1, 2]),
        messages.EncodeWords(4, ["fox", "né 🙂"]),
        messages.CheckGrammar(5, _GRAMMAR),
    ),
    "from_tokenizer": (
        *_GREETINGS,
        messages.TokenizerWelcome(1, "tokenizer-19", "a" * 64, 4096, True),
        messages.Encoded(1, [1, 2, 3]),
        messages.Decoded(3, "né 🙂"),
        messages.JobRefused(2, ErrorReason.CHAT_TEMPLATE_FAILED, "the template has no role `tool`"),
        messages.TextDeltas([5], [2], [2], ["Once upon"], [-1]),
        messages.UnknownStreams([5]),
        messages.JobRefused(5, ErrorReason.GRAMMAR_INVALID, "expected a JSON schema"),
        messages.EncodedWords(4, [[7], [8, 9]]),
        messages.GrammarAccepted(5),
    ),
}


def fields_of(value: Any) -> Any:
    """A message as JSON-like values with field names, which frames do not have."""
    if isinstance(value, msgspec.Struct):
        names = value.__struct_fields__
        return {name: fields_of(getattr(value, name)) for name in names}
    if isinstance(value, list):
        return [fields_of(each) for each in value]
    if isinstance(value, bytes):
        return value.hex()
    return value.value if isinstance(value, Enum) else value


def record() -> None:
    """Writes the frames that are not there yet."""
    for direction, samples in SAMPLES.items():
        folder = FRAMES / direction
        folder.mkdir(parents=True, exist_ok=True)
        for sample in samples:
            content = messages.encode(sample)
            kept = {each.read_bytes() for each in folder.glob(f"{type(sample).__name__}*.bin")}
            if content not in kept:
                number = f"-{len(kept) + 1}" if kept else ""
                frame = folder / f"{type(sample).__name__}{number}.bin"
                frame.write_bytes(content)
                expected = {"message": type(sample).__name__, "fields": fields_of(sample)}
                text = json.dumps(expected, indent=2, ensure_ascii=False)
                frame.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
