"""The processes behind the gateway: which of them can serve, and which one serves a request."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.messages import EngineWelcome, TokenizerWelcome

from mini_infer_gateway.engine_link import EngineLink
from mini_infer_gateway.request import GenerationRequest
from mini_infer_gateway.tokenizer_link import TokenizerLink

TICK_S = 0.1
"""How often the links look at their clocks."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the peers agree on."""

    engine: EngineWelcome
    tokenizer: TokenizerWelcome


class Peers:
    """All links, and the numbers of the streams that run over them.

    Engine and tokenizer *agree* when they were started with the same tokenizer. Their numbers of
    ids may differ: models are padded, and tokenizers get tokens that their model never learned.
    """

    def __init__(
        self,
        engine_links: Sequence[EngineLink],
        tokenizer_links: Sequence[TokenizerLink],
    ) -> None:
        """Takes links that are not started.

        Args:
            engine_links: At least one.
            tokenizer_links: At least one.
        """
        self.engine_links = tuple(engine_links)
        self.tokenizer_links = tuple(tokenizer_links)
        self._links: list[EngineLink | TokenizerLink] = [*engine_links, *tokenizer_links]
        self._numbers = itertools.count(1)

    async def run(self) -> None:
        """Keeps the links alive until cancelled."""
        loop = asyncio.get_running_loop()
        for link in self._links:
            link.start()
        while True:
            for link in self._links:
                link.tick(loop.time())
            await asyncio.sleep(TICK_S)

    def close(self) -> None:
        """Disconnects."""
        for link in self._links:
            link.close()

    def model(self) -> ServedModel:
        """What is served now.

        Raises:
            MiniInferError: ENGINE_STARTING where no engine and tokenizer are ready and agree.
        """
        engines = [link.welcome for link in self.engine_links if link.welcome]
        tokenizers = [link.welcome for link in self.tokenizer_links if link.welcome]
        cause = f"the {'tokenizer' if engines else 'engine'} is not ready"
        for engine, tokenizer in itertools.product(engines, tokenizers):
            if engine.tokenizer_hash == tokenizer.tokenizer_hash:
                return ServedModel(engine, tokenizer)
            cause = "engine and tokenizer were started with different model folders"
        raise _not_ready(cause)

    def route(self, request: GenerationRequest) -> EngineLink:
        """The engine that runs a request: the one with the fewest streams that serves the model.

        Raises:
            MiniInferError: ENGINE_STARTING.
        """
        del request  # Every engine of a model serves every request.
        model = self.model().engine
        candidates = [
            link
            for link in self.engine_links
            if link.welcome and link.welcome.fingerprint == model.fingerprint
        ]
        return min(candidates, key=lambda link: link.num_streams)

    def tokenizer(self) -> TokenizerLink:
        """The tokenizer process for a request: the ready one with the fewest streams.

        Raises:
            MiniInferError: ENGINE_STARTING.
        """
        model = self.model().tokenizer
        candidates = [
            link
            for link in self.tokenizer_links
            if link.welcome and link.welcome.tokenizer_hash == model.tokenizer_hash
        ]
        return min(candidates, key=lambda link: link.num_streams)

    def next_stream_number(self) -> int:
        """A number that no open stream has: 32 bits last for longer than any stream."""
        return next(self._numbers) & 0xFFFFFFFF


def _not_ready(cause: str) -> MiniInferError:
    return MiniInferError(ErrorReason.ENGINE_STARTING, f"{cause}: try again in a moment")
