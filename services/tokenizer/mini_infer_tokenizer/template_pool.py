"""Chat templates in child processes (`child_pool.py`), and what each of those may use."""

from __future__ import annotations

from collections.abc import Mapping

from mini_infer.messages import EncodeChat

from mini_infer_tokenizer.child_pool import ChildPool
from mini_infer_tokenizer.child_protocol import Limits
from mini_infer_tokenizer.template_protocol import TEMPLATES, TemplateSetup

TEMPLATE_LIMITS = Limits(start_cpu_s=2.0, job_cpu_s=0.4, job_s=0.8, memory_bytes=512 * 2**20)
"""A rendering takes less than a second; all templates together are compiled in two."""


class TemplatePool:
    """Processes that render a model's chat templates; safe to use from several threads."""

    def __init__(
        self,
        sources: Mapping[str, str],
        special_tokens: Mapping[str, str],
        num_processes: int,
        limits: Limits = TEMPLATE_LIMITS,
    ) -> None:
        """Starts nothing before it is needed.

        Args:
            sources: Jinja sources by name.
            special_tokens: Variables such as "bos_token" that every rendering sees.
            num_processes: Renderings at a time.
            limits: What each may use.
        """
        setup = TemplateSetup(dict(sources), dict(special_tokens))
        self._children = ChildPool(TEMPLATES, setup, num_processes, limits)

    def start(self) -> None:
        """Starts every process, and waits until one has compiled the templates.

        Raises:
            MiniInferError: CHAT_TEMPLATE_FAILED with what is wrong with the templates,
                INTERNAL_ERROR where no process can be started.
        """
        self._children.start()

    def render(self, chat: EncodeChat) -> str:
        """The text of a conversation; takes less than a second once a process is free.

        Raises:
            MiniInferError: CHAT_TEMPLATE_FAILED where the template fails or uses more than it
                may, INVALID_FIELD where it cannot take the chat, INTERNAL_ERROR where no process
                can be started or each is killed by somebody.
        """
        return self._children.do(chat)

    def close(self) -> None:
        """Ends the processes, one that renders as soon as it has. Once is enough."""
        self._children.close()
