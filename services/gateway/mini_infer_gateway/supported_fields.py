"""Which fields of requests are served, and which are refused where they are set, never ignored.

Each field of a request message stands in exactly one of the two tables; a test walks the
descriptors and compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from mini_infer.errors import ErrorReason, FieldViolation

from mini_infer_gateway.status import MAX_VIOLATIONS

SUPPORTED_FIELDS = frozenset(
    {
        "GenerateRequest.text",
        "GenerateRequest.token_ids",
        "GenerateRequest.chat",
        "GenerateRequest.model",
        "GenerateRequest.request_id",
        "GenerateRequest.priority",
        "GenerateRequest.cache_salt",
        "GenerateRequest.sampling",
        "GenerateRequest.stopping",
        "GenerateRequest.output",
        "GenerateRequest.structured_output",
        "GenerateRequest.add_special_tokens",
        "TokenIds.ids",
        "Chat.messages",
        "Chat.add_generation_prompt",
        "Chat.tools",
        "Chat.template_kwargs",
        "Chat.template_kwargs_json",
        "Chat.tools_json",
        "Chat.documents_json",
        "Chat.chat_template",
        "Chat.continue_final_message",
        "ChatMessage.role",
        "ChatMessage.content",
        "ChatMessage.name",
        "ChatMessage.tool_calls",
        "ChatMessage.tool_call_id",
        "ChatMessage.reasoning_content",
        "ToolCall.id",
        "ToolCall.function_name",
        "ToolCall.arguments_json",
        "ToolCall.arguments_text",
        "ContentPart.text",
        "SamplingOptions.temperature",
        "SamplingOptions.top_k",
        "SamplingOptions.top_p",
        "SamplingOptions.seed",
        "SamplingOptions.n",
        "SamplingOptions.min_p",
        "SamplingOptions.typical_p",
        "SamplingOptions.repetition_penalty",
        "SamplingOptions.presence_penalty",
        "SamplingOptions.frequency_penalty",
        "SamplingOptions.logit_bias",
        "SamplingOptions.allowed_token_ids",
        "SamplingOptions.bad_words",
        "StoppingOptions.max_tokens",
        "StoppingOptions.min_tokens",
        "StoppingOptions.stop",
        "StoppingOptions.stop_token_ids",
        "StoppingOptions.ignore_eos",
        "StoppingOptions.repetition_detection",
        "RepetitionDetection.max_period",
        "RepetitionDetection.min_period",
        "RepetitionDetection.num_repeats",
        "OutputOptions.ids_only",
        "OutputOptions.stream_interval",
        "OutputOptions.skip_special_tokens",
        "OutputOptions.include_stop_str_in_output",
        "OutputOptions.logprobs",
        "OutputOptions.prompt_logprobs",
        "StructuredOutput.json_schema",
        "StructuredOutput.regex",
        "StructuredOutput.grammar",
        "StructuredOutput.choice",
        "StructuredOutput.json_object",
        "Choices.texts",
        "TokenizeRequest.text",
        "TokenizeRequest.chat",
        "TokenizeRequest.add_special_tokens",
        "DetokenizeRequest.token_ids",
        "DetokenizeRequest.skip_special_tokens",
        "AbortRequest.request_id",
    }
)
UNSUPPORTED_FIELDS = {
    "GenerateRequest.adapter": ErrorReason.FIELD_NOT_SUPPORTED,
    "ContentPart.image_url": ErrorReason.UNSUPPORTED_MODALITY,
    "ContentPart.audio_url": ErrorReason.UNSUPPORTED_MODALITY,
}
"""A message type that stands here as a field is refused as a whole."""


def unsupported_fields(message: Message) -> list[FieldViolation]:
    """The fields that are set and not supported, as far as they are told."""
    return list(islice(_walk(message, ""), MAX_VIOLATIONS))


def _walk(message: Message, prefix: str) -> Iterator[FieldViolation]:
    for field, value in message.ListFields():
        path = prefix + field.name
        reason = UNSUPPORTED_FIELDS.get(f"{message.DESCRIPTOR.name}.{field.name}")
        if reason is not None:
            yield FieldViolation(path, "is not supported: leave it unset", reason)
        elif field.type != FieldDescriptor.TYPE_MESSAGE or _is_value(field):
            continue
        elif isinstance(value, Message):
            yield from _walk(value, path + ".")
        else:
            for index, element in enumerate(value):
                yield from _walk(element, f"{path}[{index}].")


def _is_value(field: FieldDescriptor) -> bool:
    """Whether the message that a field holds has no fields of ours: a map, or protobuf's own."""
    kind = field.message_type
    return kind is not None and (
        kind.file.package == "google.protobuf" or kind.GetOptions().map_entry
    )
