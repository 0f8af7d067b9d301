"""What the READMEs tell people to type works."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "README_zh.md")
DOCUMENTS = (
    *READMES,
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)
ADDRESS = "127.0.0.1:50051"
TIMEOUT_S = 100.0


def code_blocks(readme: str, language: str) -> list[str]:
    text = (ROOT / readme).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("language", ["python", "bash", "console"])
def test_both_readmes_show_the_same_code(language: str) -> None:
    english, chinese = (code_blocks(readme, language) for readme in READMES)
    assert english
    assert english == chinese


def test_python_blocks_run(server: str) -> None:
    """The client against a server, and the engine in the process."""
    for code in code_blocks("README.md", "python"):
        done = subprocess.run(
            [sys.executable, "-c", code.replace(ADDRESS, server)],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        )
        assert len(done.stdout.split()) > 10


def test_shell_blocks_run(server: str) -> None:
    for code in code_blocks("README.md", "bash"):
        words = shlex.split(code.replace("\\\n", "").replace(ADDRESS, server))
        command = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
        assert "FINISH_REASON_" in done.stdout


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_lead_somewhere(document: str) -> None:
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    named = re.findall(
        r"`((?:proto|services|kernels|models|tests|benchmarks|docs)/[\w./-]*)`", text
    )
    for target in links:
        assert (path.parent / target).exists(), target
    for target in named:
        assert (ROOT / target).exists(), target
