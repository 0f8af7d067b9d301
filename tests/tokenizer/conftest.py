"""Small tokenizers of every kind as model folders; the same that the benchmarks measure."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizer_kinds
from grammar_walks import UNSUPPORTED, vocabulary_of
from mini_infer.config import bundled_model
from mini_infer_tokenizer.detokenize import Detokenizer
from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.grammar import GrammarVocabulary


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder for each kind."""
    folders = {
        kind: tokenizer_kinds.write_folder(kind, tmp_path_factory.mktemp(kind))
        for kind in tokenizer_kinds.KINDS
    }
    return folders | {"demo": bundled_model("demo")}


@pytest.fixture(scope="session", params=["demo", *tokenizer_kinds.KINDS])
def model_folder(request: pytest.FixtureRequest, model_folders: dict[str, Path]) -> Path:
    """The folder of each kind, one after the other."""
    return model_folders[request.param]


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> TextTokenizer:
    """A tokenizer of each kind, one after the other."""
    return TextTokenizer(model_folder)


@pytest.fixture(scope="session")
def detokenizer(tokenizer: TextTokenizer) -> Detokenizer:
    return Detokenizer(tokenizer)


@pytest.fixture(scope="session")
def demo() -> TextTokenizer:
    """That of the demo model."""
    return TextTokenizer(bundled_model("demo"))


@pytest.fixture(scope="session")
def vocabulary(demo: TextTokenizer) -> GrammarVocabulary:
    """What languages of the demo model are matched with; it has two ids that end an output."""
    return GrammarVocabulary(demo, demo.vocab_size, [0, 2])


@pytest.fixture(scope="session")
def byte_level(model_folders: dict[str, Path]) -> TextTokenizer:
    return TextTokenizer(model_folders["byte_level"])


@pytest.fixture(scope="session")
def byte_fallback(model_folders: dict[str, Path]) -> TextTokenizer:
    return TextTokenizer(model_folders["byte_fallback"])


@pytest.fixture(scope="session")
def vocabularies(model_folders: dict[str, Path]) -> dict[str, GrammarVocabulary]:
    """What languages are matched with, of the kinds of tokenizer for which that is possible."""
    return {
        kind: vocabulary_of(folder)
        for kind, folder in model_folders.items()
        if kind not in UNSUPPORTED
    }
