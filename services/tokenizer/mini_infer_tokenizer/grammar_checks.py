"""Whether languages can be used, tried in child processes before an engine meets them.

An engine that compiled a client's language unseen could be stopped by it: for seconds, or for good.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.structured_output import Grammar

from mini_infer_tokenizer.child_pool import ChildPool
from mini_infer_tokenizer.child_protocol import Limits
from mini_infer_tokenizer.grammar_protocol import GRAMMARS, GrammarSetup

GRAMMAR_LIMITS = Limits(
    start_cpu_s=1.0,
    job_cpu_s=0.07,
    job_s=1.0,
    memory_bytes=64 * 2**20,
    stack_bytes=2**20,
)
"""70 ms of processor time and 64 MB for each language: with what it takes to end a process and to
clean up behind it, a refusal takes less than 100 ms on a machine that has nothing else to do. The
stack is half of what the library's threads have in an engine, where it must not overflow."""
NUM_GRAMMAR_PROCESSES = 2
"""One works while another starts anew, which takes about a second: a hostile language delays the
others by no more than that."""

_MAX_VERDICTS = 4096
"""Languages that are remembered, by their hash."""
_REFUSED_FOR_S = 30.0
"""How long a refusal is remembered. One that was near a limit may be accepted another time."""


class _Refusal(NamedTuple):
    """Why a language was refused, and until when that counts (monotonic time, seconds)."""

    message: str
    until: float


class GrammarChecks:
    """Checks languages; safe to use from several threads.

    Most clients send the same few languages again and again, so what was found is remembered.
    """

    def __init__(
        self,
        model_folder: Path,
        num_processes: int = NUM_GRAMMAR_PROCESSES,
        limits: Limits = GRAMMAR_LIMITS,
    ) -> None:
        """Starts no process before the first language: most servers never see one.

        Args:
            model_folder: Holds the tokenizer.
            num_processes: Languages that are tried at a time.
            limits: What each may use.
        """
        setup = GrammarSetup(str(model_folder.absolute()))
        self._children = ChildPool(GRAMMARS, setup, num_processes, limits)
        # What was found of a language: None where it was accepted.
        self._verdicts: OrderedDict[bytes, _Refusal | None] = OrderedDict()
        self._lock = Lock()

    def recall(self, grammar: Grammar) -> bool:
        """Whether a language was accepted lately; takes no process.

        Raises:
            MiniInferError: GRAMMAR_INVALID as it was refused lately.
        """
        return self._recall(_digest(grammar))

    def check(self, grammar: Grammar) -> None:
        """Tries a language. The first one also waits for a process to start: a second or two.

        Raises:
            MiniInferError: GRAMMAR_INVALID where the language is not valid or takes more than it
                may, FIELD_NOT_SUPPORTED where the tokenizer cannot be matched, INVALID_FIELD where
                the description is no Unicode, INTERNAL_ERROR where no process can be started.
        """
        digest = _digest(grammar)
        if self._recall(digest):
            return
        try:
            self._children.do(grammar)
        except MiniInferError as error:
            if error.reason is ErrorReason.GRAMMAR_INVALID:
                self._remember(digest, _Refusal(error.message, time.monotonic() + _REFUSED_FOR_S))
            raise
        self._remember(digest, None)

    def _recall(self, digest: bytes) -> bool:
        with self._lock:
            if digest not in self._verdicts:
                return False
            self._verdicts.move_to_end(digest)
            refusal = self._verdicts[digest]
        if refusal is not None and time.monotonic() < refusal.until:
            raise MiniInferError(ErrorReason.GRAMMAR_INVALID, refusal.message)
        return refusal is None

    def _remember(self, digest: bytes, verdict: _Refusal | None) -> None:
        with self._lock:
            self._verdicts[digest] = verdict
            if len(self._verdicts) > _MAX_VERDICTS:
                self._verdicts.popitem(last=False)

    def close(self) -> None:
        """Ends the processes. Once is enough."""
        self._children.close()


def _digest(grammar: Grammar) -> bytes:
    text = f"{grammar.kind.value} {grammar.source}"
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()
