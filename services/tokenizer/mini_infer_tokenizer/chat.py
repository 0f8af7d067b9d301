"""Conversations to prompt text, by the chat templates of the model folder.

Templates are programs that came with the model, so they run in child processes (`template_pool.py`)
and there in Jinja's immutable sandbox (`template_rendering.py`). A request names a template and
gives it values; it never brings a template of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mini_infer.errors import ErrorReason, MiniInferError, ModelFolderError
from mini_infer.messages import EncodeChat

from mini_infer_tokenizer.template_pool import TemplatePool
from mini_infer_tokenizer.template_sources import read_chat_templates


class ChatTemplates:
    """A model's chat templates, one or several; safe to use from several threads.

    Attributes:
        names: Of the templates; empty where the model has none.
    """

    def __init__(
        self, folder: Path, special_tokens: Mapping[str, str], num_processes: int = 1
    ) -> None:
        """Reads the templates; no process is started before it is needed.

        Args:
            folder: The model folder.
            special_tokens: Variables such as "bos_token" that every rendering sees.
            num_processes: Conversations that are rendered at a time.

        Raises:
            ModelFolderError: Where the templates cannot be read.
        """
        sources = read_chat_templates(folder)
        self.names = tuple(sources)
        self._folder = folder
        self._pool = TemplatePool(sources, special_tokens, num_processes)

    def start(self) -> None:
        """Has the templates compiled, so that a bad one is told now; later calls cost little.

        Raises:
            ModelFolderError: Where one is no template, or does not let itself be compiled.
        """
        if self.names:
            try:
                self._pool.start()
            except MiniInferError as error:
                raise ModelFolderError(f"{self._folder}: {error.message}") from error

    def render(self, chat: EncodeChat) -> str:
        """The prompt text of a conversation; encode it without adding special tokens.

        Raises:
            MiniInferError: CHAT_TEMPLATE_FAILED where there is no template, where it fails (with
                its own words) or uses more time or memory than it may; INVALID_FIELD where it
                cannot take what the chat holds.
        """
        if not self.names:
            message = "the model has no chat template: send the prompt as text"
            raise MiniInferError(ErrorReason.CHAT_TEMPLATE_FAILED, message)
        return self._pool.render(chat)

    def close(self) -> None:
        """Ends the processes. Once is enough."""
        self._pool.close()
