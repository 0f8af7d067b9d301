"""What the processes that render chat templates are told."""

from __future__ import annotations

import msgspec
from mini_infer.errors import ErrorReason

from mini_infer_tokenizer.child_protocol import ChildKind

TEMPLATES = ChildKind(
    module="mini_infer_tokenizer.template_child",
    subject="chat template",
    reason=ErrorReason.CHAT_TEMPLATE_FAILED,
)


class TemplateSetup(msgspec.Struct, frozen=True, array_like=True):
    """What a template process renders with.

    Attributes:
        sources: The templates by their names.
        special_tokens: Variables that every rendering sees.
    """

    sources: dict[str, str]
    special_tokens: dict[str, str]
