"""The bytes that each token adds to an output, for matching outputs against a language.

They are what the readers of `pieces.py` make text of, so a language that is matched by bytes holds
for the text. Decoders whose text of a token depends on the tokens beside it have no such bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mini_infer.errors import ErrorReason, MiniInferError, ModelFolderError

from mini_infer_tokenizer.byte_runs import byte_of
from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.token_texts import DecoderPlan, TokenTexts, bytes_of, plan_decoder


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """What every token adds to an output.

    Attributes:
        tokens: The bytes of each id; empty for special tokens and for ids that mean nothing.
        opening: What the decoder leaves out at the beginning of a text: the bytes of an output are
            this, then its text. So a Llama 2 model can begin as it learned to, with a space.
    """

    tokens: list[bytes]
    opening: str


def read_token_bytes(tokenizer: TextTokenizer) -> TokenBytes:
    """Finds the bytes of every token.

    Raises:
        MiniInferError: FIELD_NOT_SUPPORTED where a token's text depends on its neighbours.
    """
    try:
        plan = plan_decoder(tokenizer.decoder_steps)
        if plan.is_byte_level:
            return TokenBytes(_each(tokenizer, bytes_of), opening="")
        if plan.drops_repeated or plan.depends_on_next:
            raise _not_supported("repeated tokens, or the ends of words, change its text")
        return _by_place(tokenizer, plan, TokenTexts(plan))
    except ModelFolderError as error:
        raise _not_supported(str(error)) from error


def _by_place(tokenizer: TextTokenizer, plan: DecoderPlan, texts: TokenTexts) -> TokenBytes:
    """The bytes where only the first token's text may differ, by what `opening` says."""

    def bytes_behind(token: str) -> bytes:
        text = texts.behind(token).last
        return (byte_of(text) if plan.has_byte_fallback else None) or text.encode()

    tokens = _each(tokenizer, bytes_behind)
    if plan.has_byte_fallback or plan.num_to_strip:
        return TokenBytes(tokens, opening=plan.strip * plan.num_to_strip)
    pairs = [(texts.first(token).last, texts.behind(token).last) for _, token in tokenizer.tokens()]
    if all(first == behind for first, behind in pairs):
        return TokenBytes(tokens, opening="")
    if all(first == behind[1:] for first, behind in pairs if behind.startswith(" ")):
        return TokenBytes(tokens, opening=" ")
    raise _not_supported("a token that begins the text changes more than the space before it")


def _each(tokenizer: TextTokenizer, bytes_of_token: Callable[[str], bytes]) -> list[bytes]:
    tokens = [b""] * tokenizer.vocab_size
    for token_id, token in tokenizer.tokens():
        if token_id not in tokenizer.special_ids:
            tokens[token_id] = bytes_of_token(token)
    return tokens


def _not_supported(cause: str) -> MiniInferError:
    message = f"structured output is not supported with the decoder of this tokenizer: {cause}"
    return MiniInferError(ErrorReason.FIELD_NOT_SUPPORTED, message)
