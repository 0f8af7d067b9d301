"""Options of Generate requests, from protobuf to the types that judge them.

Reading never fails: what a message says is carried over, and `validation.py` judges it.
"""

from __future__ import annotations

from mini_infer.sampling_params import RepetitionDetection, SamplingParams
from mini_infer.structured_output import StructuredOutput
from mini_infer.v1 import generate_pb2

from mini_infer_gateway.wire import optional_field


def read_sampling_params(message: generate_pb2.GenerateRequest) -> SamplingParams:
    """Sampling, stopping and the language of the output of a request."""
    sampling, stopping, output = message.sampling, message.stopping, message.output
    return SamplingParams(
        temperature=optional_field(sampling, "temperature"),
        top_k=optional_field(sampling, "top_k"),
        top_p=optional_field(sampling, "top_p"),
        min_p=optional_field(sampling, "min_p"),
        typical_p=optional_field(sampling, "typical_p"),
        repetition_penalty=optional_field(sampling, "repetition_penalty"),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        allowed_token_ids=tuple(sampling.allowed_token_ids),
        bad_words=tuple(sampling.bad_words),
        n=optional_field(sampling, "n", 1),
        seed=optional_field(sampling, "seed"),
        max_tokens=optional_field(stopping, "max_tokens"),
        min_tokens=stopping.min_tokens,
        stop=tuple(stopping.stop),
        stop_token_ids=tuple(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
        repetition_detection=_read_repetition_detection(stopping),
        structured_output=_read_structured_output(message),
        logprobs=optional_field(output, "logprobs"),
        prompt_logprobs=optional_field(output, "prompt_logprobs"),
        skip_special_tokens=optional_field(output, "skip_special_tokens", True),
        include_stop_str_in_output=output.include_stop_str_in_output,
    )


def _read_repetition_detection(
    stopping: generate_pb2.StoppingOptions,
) -> RepetitionDetection | None:
    if not stopping.HasField("repetition_detection"):
        return None
    detection = stopping.repetition_detection
    return RepetitionDetection(
        max_period=detection.max_period,
        min_period=optional_field(detection, "min_period", 1),
        num_repeats=detection.num_repeats,
    )


def _read_structured_output(message: generate_pb2.GenerateRequest) -> StructuredOutput | None:
    if not message.HasField("structured_output"):
        return None
    structured = message.structured_output
    match structured.WhichOneof("language"):
        case "json_schema":
            return StructuredOutput(json_schema=structured.json_schema)
        case "regex":
            return StructuredOutput(regex=structured.regex)
        case "grammar":
            return StructuredOutput(grammar=structured.grammar)
        case "choice":
            return StructuredOutput(choice=tuple(structured.choice.texts))
        case "json_object":
            # False, which is refused, is no other language either.
            return StructuredOutput(json_object=True)
        case _:
            return StructuredOutput()
