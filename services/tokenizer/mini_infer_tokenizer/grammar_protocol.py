"""What the processes that check languages are told."""

from __future__ import annotations

import msgspec
from mini_infer.errors import ErrorReason

from mini_infer_tokenizer.child_protocol import ChildKind

GRAMMARS = ChildKind(
    module="mini_infer_tokenizer.grammar_child",
    subject="structured output",
    reason=ErrorReason.GRAMMAR_INVALID,
    hint="describe a smaller language, with fewer or shorter repetitions and alternatives",
    niceness=5,
)


class GrammarSetup(msgspec.Struct, frozen=True, array_like=True):
    """What a process checks languages with.

    Attributes:
        model_folder: Where the tokenizer is; an absolute path.
    """

    model_folder: str
