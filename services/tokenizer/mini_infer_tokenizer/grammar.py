"""Outputs that belong to a language: which tokens may come next, and which must.

The llguidance library compiles the language and walks it; this module gives it the bytes of our
tokens (`token_bytes.py`), bounds what it may use, and says what it found in our terms. It needs
neither sockets nor torch: the engine has a `Matcher` for each sequence, and the tokenizer process
compiles each language once before, in a child process (`grammar_checks.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path

import llguidance
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from mini_infer.errors import MiniInferError
from mini_infer.structured_output import Grammar
from numpy import int32, uint32
from numpy.typing import NDArray

from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.grammar_source import cause_of, invalid, library_grammar
from mini_infer_tokenizer.token_bytes import read_token_bytes

MAX_FORCED_TOKENS = 256
"""That `Matcher.forced` finds at once; what is behind them, it finds at the next call."""

_WINDOW_BYTES = 64
"""Of a long text that must follow, this decides what its first token is: encoding all of it for
each of its tokens would take quadratic time."""

_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=400_000,
    step_lexer_fuel=50_000,
    step_max_items=2000,
    max_lexer_states=40_000,
    max_grammar_size=100_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)
"""Of each matcher, for as long as it lives. A state of the lexer takes less than a kilobyte, so all
of them take tens of megabytes at most. Items are what an ambiguous grammar (`e: e e`) has more
of with each token: so many take 10 ms at most, and an object of 300 optional fields has room.
`precompute_large_lexemes` would walk the whole vocabulary while a language is compiled. Errors
quote nothing of the language."""

_MARKER = "\x02"
"""What tokenizers put before a text, such as a space, they put before this instead."""


class GrammarVocabulary:
    """A model's tokens as matchers see them; safe to use from several threads.

    Attributes:
        vocab_size: Number of logits of the model.
        num_mask_words: 32-bit words of a row of a bitmask: bit `b` of word `w` is token
            `32 * w + b`. Bits at and behind `vocab_size` mean nothing.
        can_spell_all: Whether every text can be written with the tokens.
        stand_in_id: Where the model has no end of sequence: the id that the library takes for it,
            which is never allowed.
        opening: What the bytes of an output begin with, and its text does not (`TokenBytes`).
        library: The library's tokenizer.
    """

    def __init__(
        self, model: Path | TextTokenizer, vocab_size: int, eos_token_ids: Collection[int]
    ) -> None:
        """Reads the tokens: about a second for a vocabulary of 128,000.

        Args:
            model: The tokenizer, or the model folder to load it from.
            vocab_size: Number of logits of the model. Ids that the tokenizer does not have are
                never allowed, and those beyond the logits are left out.
            eos_token_ids: Ids that are allowed where an output may end. Without any, an output
                ends only where nothing can follow (`Matcher.is_complete`).

        Raises:
            ModelFolderError: Where the folder has no tokenizer that can be loaded.
            MiniInferError: FIELD_NOT_SUPPORTED where the tokenizer has no bytes to match.
        """
        tokenizer = TextTokenizer(model) if isinstance(model, Path) else model
        read = read_token_bytes(tokenizer)
        tokens = [*read.tokens[:vocab_size], *[b""] * (vocab_size - len(read.tokens))]
        ends = sorted({each for each in eos_token_ids if 0 <= each < vocab_size})
        self.stand_in_id: int | None = None
        if not ends:
            self.stand_in_id = tokens.index(b"") if b"" in tokens else vocab_size - 1
            ends = [self.stand_in_id]
        for each in ends:  # Where one has a text, it is no part of an output.
            tokens[each] = b""
        self.vocab_size = vocab_size
        self.num_mask_words = (vocab_size + 31) // 32
        self._wrapper = _LibraryTokenizer(tokenizer, tokens, ends[0])
        self.can_spell_all = len(self._wrapper.byte_ids) == 256
        self.opening = read.opening
        self.library = llguidance.LLTokenizer(self._wrapper, eos_token=ends)

    def compile(self, grammar: Grammar) -> Matcher:
        """Makes a matcher at the beginning of an output.

        Takes milliseconds, and for large languages up to a tenth of a second, in which the
        interpreter lock is free.

        Raises:
            MiniInferError: GRAMMAR_INVALID where the description is not valid, or needs more than
                a matcher may use.
        """
        return Matcher(self, library_grammar(grammar, self.opening))

    def first_token(self, data: bytes) -> int:
        """The token that begins bytes of a text, which may have been cut anywhere.

        Only where `can_spell_all`.
        """
        text = data.decode(errors="ignore")
        begins_whole = text != "" and data.startswith(text[0].encode())
        return self._wrapper(text)[0] if begins_whole else self._wrapper.byte_ids[data[0]]


class Matcher:
    """Where an output stands in its language. Only one thread at a time may use it.

    Its state is that of the ids it was advanced by, in whatever portions, and of nothing else. It
    shares nothing with other matchers: what its language makes of its output costs it alone.
    """

    def __init__(self, vocabulary: GrammarVocabulary, source: str) -> None:
        """Compiles a language; called by `GrammarVocabulary.compile`.

        Args:
            vocabulary: The tokens.
            source: The library's description of the language.

        Raises:
            MiniInferError: GRAMMAR_INVALID where it cannot be compiled.
        """
        self._vocabulary = vocabulary
        self._library = llguidance.LLMatcher(
            vocabulary.library, source, log_level=0, limits=_LIMITS
        )
        if self._library.is_error():
            raise invalid(self._library.get_error())

    def fill(self, row: NDArray[int32]) -> None:
        """Writes which tokens may come next; the interpreter lock is free meanwhile.

        End-of-sequence ids are among them where the output may end. Where the matcher fails,
        nothing is: see `error`.

        Args:
            row: [num_mask_words], contiguous; what is in it is overwritten.
        """
        fill_next_token_bitmask(self._library, row[None])
        self._clear(row)

    def advance(self, token_ids: Sequence[int]) -> int:
        """Takes the next tokens of the output, up to one that the language does not allow.

        Returns:
            How many were taken.
        """
        vocab_size = self._vocabulary.vocab_size
        known = list(takewhile(lambda token_id: 0 <= token_id < vocab_size, token_ids))
        return self._library.try_consume_tokens(known)

    def forced(self) -> list[int]:
        """The tokens that come next where the language admits one text only, as far as it does.

        They are as the tokenizer would choose them, where `fill` allows any tokens of that text.
        Each depends on the state before it alone: behind the first of them, the rest is the same.
        The state stays as it is.

        Returns:
            At most `MAX_FORCED_TOKENS`; none where the vocabulary cannot write every text.
        """
        token_ids: list[int] = []
        while len(token_ids) < MAX_FORCED_TOKENS:
            token_id = self.next_forced()
            if token_id is None or self._library.try_consume_tokens([token_id]) != 1:
                break
            token_ids.append(token_id)
        self._library.rollback(len(token_ids))
        return token_ids

    def next_forced(self) -> int | None:
        """The first of `forced`, or None where there is none."""
        if not self._vocabulary.can_spell_all:
            return None
        following = self._library.compute_ff_bytes()
        if len(following) > 2 * _WINDOW_BYTES:
            return self._vocabulary.first_token(following[:_WINDOW_BYTES])
        # Towards the end, a token could be a longer one with what follows: the library leaves out
        # those. It looks for tokens only where it was asked for bytes.
        token_ids = self._library.compute_ff_tokens() if following else []
        return token_ids[0] if token_ids else None

    @property
    def may_end(self) -> bool:
        """Whether the output so far belongs to the language."""
        return self._library.is_accepting()

    @property
    def is_complete(self) -> bool:
        """Whether the output so far belongs to the language, and nothing longer does."""
        return self._library.is_stopped() and not self._library.is_error()

    @property
    def error(self) -> str | None:
        """Why the matcher failed, for good, or None: the language grew beyond its limits."""
        return cause_of(self._library.get_error()) if self._library.is_error() else None

    def _clear(self, row: NDArray[int32]) -> None:
        """Takes out of a row what the library lets follow and no output may."""
        if self._library.is_error():  # Its output would end here.
            row[:] = 0
        elif self._vocabulary.stand_in_id is not None:
            word, bit = divmod(self._vocabulary.stand_in_id, 32)
            row.view(uint32)[word] &= ~uint32(1 << bit)


def fill_all(matchers: Mapping[int, Matcher], bitmask: NDArray[int32]) -> None:
    """Does `Matcher.fill` for many matchers in parallel; the interpreter lock is free meanwhile.

    Args:
        matchers: By their row of the bitmask; each one once.
        bitmask: [num_rows, num_mask_words], contiguous; other rows stay as they are.
    """
    if not matchers:
        return
    rows = [(matcher._library, row) for row, matcher in matchers.items()]
    fill_next_token_bitmask_par(_executor(), rows, bitmask)
    for row, matcher in matchers.items():
        matcher._clear(bitmask[row])


@cache
def _executor() -> llguidance.LLExecutor:
    """Threads for masks, as many as are worth it: the library's choice."""
    return llguidance.LLExecutor()


class _LibraryTokenizer(llguidance.TokenizerWrapper):
    """What the library asks of a tokenizer: its tokens, and how it would write a text.

    Attributes:
        byte_ids: The tokens of a single byte.
    """

    def __init__(self, tokenizer: TextTokenizer, tokens: list[bytes], eos_token_id: int) -> None:
        """Takes the bytes of each token."""
        self.tokens = tokens
        self.eos_token_id = eos_token_id
        self.bos_token_id = None
        self.special_token_ids = ()
        self.is_tokenizer_wrapper = True
        self.byte_ids = {each[0]: index for index, each in enumerate(tokens) if len(each) == 1}
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """Tokens that are just the bytes of a text in the middle of an output."""
        data = text.encode()
        for before in ("", _MARKER):
            token_ids = self._tail(before + text, len(data))
            if b"".join(map(self.tokens.__getitem__, token_ids)) == data:
                return token_ids
        return [self.byte_ids[byte] for byte in data]

    def _tail(self, text: str, num_bytes: int) -> list[int]:
        """The last tokens of a text, which have so many bytes; none where that cannot be."""
        try:
            token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        except MiniInferError:
            return []
        begin = len(token_ids)
        while num_bytes > 0 and begin > 0 and token_ids[begin - 1] < len(self.tokens):
            begin -= 1
            num_bytes -= len(self.tokens[token_ids[begin]])
        return token_ids[begin:] if num_bytes == 0 else []
