"""`python -m mini_infer_tokenizer.template_child`: renders chat templates until its socket closes.

The sandbox of Jinja keeps a template from reaching what it should not, and the process
(`child_main.py`) keeps it from using up what everybody needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from mini_infer.errors import MiniInferError
from mini_infer.messages import EncodeChat, WireChatMessage

from mini_infer_tokenizer.child_main import ChildWork, run
from mini_infer_tokenizer.template_protocol import TEMPLATES, TemplateSetup
from mini_infer_tokenizer.template_rendering import TemplateSet

_WARM_UP = (
    "{{ '\\n' ~ strftime_now('%c') ~ lipsum(1) ~ messages | tojson | striptags }}{{ ''.__class__ }}"
)
"""Has Python and Jinja load what they load late, while files can still be opened."""

_WARM_UP_CHAT = EncodeChat(0, [WireChatMessage("user", "")], True)


def main() -> None:
    """Takes the socket as standard input."""
    run(
        ChildWork(
            kind=TEMPLATES,
            setup_type=TemplateSetup,
            job_type=EncodeChat,
            prepare=_prepare,
            start=_start,
        )
    )


def _prepare(setup: TemplateSetup) -> TemplateSetup:
    with contextlib.suppress(MiniInferError):
        TemplateSet({"default": _WARM_UP}, {}).render(_WARM_UP_CHAT)
    return setup


def _start(setup: TemplateSetup) -> Callable[[EncodeChat], str]:
    return TemplateSet(setup.sources, setup.special_tokens).render


if __name__ == "__main__":
    main()
