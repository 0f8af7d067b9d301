"""Why a row of a step has no next token."""

from __future__ import annotations

from mini_infer.errors import ErrorReason, MiniInferError

from mini_infer_engine.batch import RowStatus
from mini_infer_engine.sequence import Sequence


def row_problem(sequence: Sequence, status: int) -> MiniInferError:
    """The error that ends a sequence, and no other, whose `RowStatus` is not OK."""
    has_conditions = sequence.is_masked or sequence.bias is not None
    if status == RowStatus.NON_FINITE or not has_conditions:
        message = (
            "the model's logits are not finite numbers: the weights or the prompt are at fault"
        )
        return MiniInferError(ErrorReason.NUMERICAL_ERROR, message)
    if sequence.grammar is not None and sequence.grammar.matcher.error:
        return sequence.grammar.problem()
    message = (
        "the request's conditions leave no token to choose from: check allowed_token_ids, "
        "bad_words, logit_bias, min_tokens and structured_output against each other"
    )
    return MiniInferError(ErrorReason.NO_TOKEN_ALLOWED, message)
