"""Models by their ids on the Hugging Face Hub: downloaded once, then read from a local cache.

A setting `model` names a folder or a Hub id such as `org/name`. What a start needs of a repository
is fetched with the `huggingface_hub` library, into the cache that other tools use as well:
configuration, tokenizer, chat templates and safetensors, never pickled weights or code. The
library's own variables hold (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT); it is imported only
where an id is looked up.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mini_infer.config import EngineConfig, TokenizerConfig
from mini_infer.errors import ConfigError
from mini_infer.model_folder import INDEX_FILE, SINGLE_FILE, TOKENIZER_FILE, read_weight_map

if TYPE_CHECKING:
    from huggingface_hub.utils.tqdm import tqdm

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    INDEX_FILE,
)
"""What is fetched of every repository, as patterns; weights come on top."""

NEEDED_FILES = ("config.json", TOKENIZER_FILE)
DEFAULT_REVISION = "main"
MAX_ATTEMPTS = 5
"""Of a file whose connection breaks: the library itself goes on after most breaks."""

_HUB_ID = re.compile(r"(?!.*(?:--|\.\.|\.git$|[.-](?:/|$)))\w[\w.-]*/\w[\w.-]*", re.ASCII)
MAX_HUB_ID_LENGTH = 96
_REVISION = re.compile(r"(?!.*\.\.)[\w][\w./+-]{0,254}", re.ASCII)

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""

Check = Callable[[Path], object]
"""Called with a folder that lacks its weights; raises where they are not worth a download."""

ModelConfigT = TypeVar("ModelConfigT", EngineConfig, TokenizerConfig)


class HubError(ConfigError):
    """A Hub id that cannot be had, and what to do about it."""


def is_hub_id(model: str) -> bool:
    """Whether a `model` setting is looked up on the Hub: `org/name`, unless that is a folder here.

    What begins with `/`, `.` or `~` or has another number of slashes is always a folder.
    """
    is_id = len(model) <= MAX_HUB_ID_LENGTH and bool(_HUB_ID.fullmatch(model))
    return is_id and not os.path.isdir(model)


def with_local_model(
    config: ModelConfigT, on_progress: Progress | None = None, check: Check | None = None
) -> ModelConfigT:
    """A config whose model is a folder: a Hub id is downloaded, as far as the process needs it.

    The engine needs the weights, the tokenizer does not. The model goes on being served under its
    id, unless another name is set.

    Args:
        config: Of an engine or a tokenizer.
        on_progress: Called with bytes downloaded and bytes in all, while weights are fetched.
        check: As `resolve_model`.

    Raises:
        ConfigError: As `resolve_model`.
    """
    is_engine = isinstance(config, EngineConfig)
    folder = resolve_model(
        config.model, config.revision, weights=is_engine, on_progress=on_progress, check=check
    )
    if folder is None:
        return config
    local = replace(config, model=str(folder), revision="")
    if isinstance(local, EngineConfig):
        local = replace(local, served_model_name=local.served_model_name or config.model)
    return local


def resolve_model(
    model: str,
    revision: str = "",
    *,
    weights: bool = True,
    on_progress: Progress | None = None,
    check: Check | None = None,
) -> Path | None:
    """Finds a Hub id's files on this machine, after downloading what is missing.

    Without network, what was downloaded before is used.

    Args:
        model: A Hub id; anything else is not looked up.
        revision: Branch, tag or commit; empty means the branch "main".
        weights: Whether the weights are needed.
        on_progress: Called with bytes downloaded and bytes in all, while weights are fetched.
        check: Called with the folder before the weights are fetched; what it raises is raised.

    Returns:
        The folder; None where the model is no Hub id.

    Raises:
        HubError: There is no such repository or revision, it may not be read, it has no
            safetensors or lacks another file that is needed, or network or disk do not let it
            be downloaded.
        ConfigError: A revision was given of what is no Hub id.
    """
    if not is_hub_id(model):
        if revision:
            raise ConfigError(
                f"revision {revision} is of a Hub id such as org/name, and the model "
                f"{model or '(the demo)'} is a folder: leave it out"
            )
        return None
    revision = revision or DEFAULT_REVISION
    if not _REVISION.fullmatch(revision):
        raise HubError(f"revision {revision!r} is no name of a branch, tag or commit")
    folder, sizes = _ask_hub(model, revision, partial(_fetch_small_files, model, revision))
    if weights:
        _check_complete(model, sizes)
        if check:
            check(folder)
        _fetch_weights(model, revision, folder, sizes, on_progress or _ignore)
    return folder


def cached_model(model: str, revision: str = "") -> Path | None:
    """The folder of a Hub id that was downloaded before, without asking the Hub.

    Args:
        model: A Hub id.
        revision: As `resolve_model`.

    Raises:
        HubError: The cache cannot be read.
    """
    from huggingface_hub import try_to_load_from_cache

    revision = revision or DEFAULT_REVISION
    look_up = partial(try_to_load_from_cache, model, "config.json", revision=revision)
    config = _ask_hub(model, revision, look_up)
    return Path(config).parent if isinstance(config, str) else None


def _fetch_small_files(model: str, revision: str) -> tuple[Path, dict[str, int]]:
    """Returns the folder of a revision's files, and the size of each file in the repository."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    folder = Path(
        snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(SMALL_FILES),
            tqdm_class=_progress_bar(_ignore),
        )
    )
    try:
        files = get_cached_repo_tree(model, revision=folder.name)
    except CachedRepoTreeNotFoundError:  # Offline, and an older library filled the cache.
        return folder, {each.name: each.stat().st_size for each in folder.iterdir()}
    return folder, {each.path: _checked_size(each.size) for each in files}


def _checked_size(size: object) -> int:
    if not isinstance(size, int) or size < 0:
        raise ValueError(f"a file of {size!r:.40} bytes")
    return size


def _check_complete(model: str, sizes: Mapping[str, int]) -> None:
    missing = [name for name in NEEDED_FILES if name not in sizes]
    if missing:
        raise HubError(
            f"the Hub's {model} has no {' and no '.join(missing)}: choose a repository that has "
            "what `transformers` reads"
        )


def _fetch_weights(
    model: str, revision: str, folder: Path, sizes: Mapping[str, int], on_progress: Progress
) -> None:
    """Downloads the weight files that the loader reads and that are not there yet."""
    wanted = _weight_names(model, folder, sizes)
    missing = [name for name in wanted if not os.path.exists(folder / name)]
    if not missing:
        return
    num_bytes = sum(sizes[name] for name in missing)
    num_free_bytes = shutil.disk_usage(folder).free
    if num_bytes > num_free_bytes:
        raise _disk_full(model, f"{num_bytes} bytes are needed, {num_free_bytes} are free")
    num_bytes_done = 0

    def report(num_file_bytes: int) -> None:
        on_progress(num_bytes_done + num_file_bytes, num_bytes)

    # One after the other: where that ends early, as by Ctrl-C, no more than one is in parts.
    for name in missing:
        _ask_hub(model, revision, partial(_download, model, folder.name, name, report))
        num_bytes_done += sizes[name]


def _weight_names(model: str, folder: Path, sizes: Mapping[str, int]) -> Sequence[str]:
    """The weight files of a repository, in the order in which the loader looks for them."""
    if SINGLE_FILE in sizes:
        return [SINGLE_FILE]
    if INDEX_FILE not in sizes:
        raise HubError(
            f"the Hub's {model} has neither {SINGLE_FILE} nor {INDEX_FILE}: choose a repository "
            "with weights as safetensors; pickled ones can run code and are never fetched"
        )
    names = sizes.keys() & read_weight_map(folder).values()
    return sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)


def _download(model: str, commit: str, name: str, report: Callable[[int], None]) -> None:
    """Downloads one file, again where its connection breaks."""
    import httpx2
    from huggingface_hub import hf_hub_download

    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            bar = _progress_bar(report)
            hf_hub_download(model, name, revision=commit, tqdm_class=bar)
            return
        except httpx2.TransportError:
            if attempt == MAX_ATTEMPTS:
                raise


def _progress_bar(report: Callable[[int], None]) -> type[tqdm]:
    """What the library takes for a progress bar; shows nothing and reports the bytes so far."""
    from huggingface_hub.utils.tqdm import tqdm

    class Reporter(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]
            self.num_bytes = int(self.n)

        def update(self, n: float | None = 1) -> None:
            self.num_bytes += int(n or 0)
            report(self.num_bytes)

    return Reporter


ResultT = TypeVar("ResultT")


def _ask_hub(model: str, revision: str, ask: Callable[[], ResultT]) -> ResultT:
    """Does what may fail in the library, whose errors become `HubError`s."""
    import httpx2
    from huggingface_hub import constants, errors

    try:
        return ask()
    except errors.GatedRepoError as error:
        raise HubError(
            f"the Hub's {model} is gated: accept its terms on {constants.ENDPOINT}/{model}, then "
            "set HF_TOKEN to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"there is no folder {model} here and no repository {model} on the Hub that can be "
            "read: check the name; if it is private, set HF_TOKEN to a token that may read it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"the Hub's {model} has no branch, tag or commit {revision}: pass another --revision"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, httpx2.HTTPError) as error:
        raise HubError(
            f"{model} at {revision} is not (wholly) in the cache {constants.HF_HUB_CACHE}, and "
            f"{_why_not_downloaded(error)}"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(model, "the disk is full") from error
        raise HubError(
            f"{model} could not be downloaded into {constants.HF_HUB_CACHE} "
            f"({error.strerror or _first_line(error)}): set HF_HOME to a folder that can be "
            "written, or try again"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        # Answers that no Hub gives, such as file names that lead out of the cache.
        raise HubError(
            f"{constants.ENDPOINT} gave an unusable answer about {model} "
            f"({type(error).__name__}: {_first_line(error)}): choose another repository"
        ) from error


def _why_not_downloaded(error: BaseException) -> str:
    """What stands in the way of a download, and what to do about it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    for each in (error, error.__cause__):
        if isinstance(each, HfHubHTTPError):
            status = each.response.status_code
            remedy = "try again later; what is complete is kept"
            if status in (401, 403):
                remedy = "set HF_TOKEN to a token that may read it, or unset a wrong one"
            return f"{constants.ENDPOINT} answered {status}: {remedy}"
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set: unset it to download"
    return (
        f"{constants.ENDPOINT} cannot be reached: try again with network; what is complete is kept"
    )


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _disk_full(model: str, why: str) -> HubError:
    return HubError(
        f"{model} does not fit on the disk, {why}: free some, or set HF_HOME to a folder on a "
        "larger one"
    )


def _ignore(*_: int) -> None:
    """Takes a progress that nobody wants to see."""
