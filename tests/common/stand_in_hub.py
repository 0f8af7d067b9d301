"""A Hugging Face Hub on loopback: as much of its protocol as a download needs."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE_BYTES = 10_000
"""Larger files are stored apart and redirected to, as Git LFS does."""

WAIT_S = 60.0
TOKEN = "hf_notarealtokenatall"

SMALL = {
    name: f"content of {name}".encode()
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
    )
}
WEIGHTS = bytes(range(256)) * 200


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a look-up gave: a folder or an error."""

    folder: Path | None
    error: str
    progress: list[tuple[int, int]]
    stderr: str


Resolve = Callable[..., Outcome]
"""Looks an id up: takes model and revision, `weights`, and variables of the environment."""


@dataclass(slots=True)
class Repository:
    """A repository: the files of each commit, and the names of commits.

    Attributes:
        commits: Content by file name, by commit hash.
        refs: Commit hash by branch or tag.
        refusal: Status and `X-Error-Code` of every answer, in place of content.
        listed: Sizes by name of files that are listed beside the real ones, and not there.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    refusal: tuple[int, str] | None = None
    listed: dict[str, int] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        """Adds a commit, and points a branch or tag to it; returns its hash."""
        content = b"".join(name.encode() + data for name, data in sorted(files.items()))
        commit = hashlib.sha1(content).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[ref] = commit
        return commit


@dataclass(slots=True)
class StandInHub:
    """What the server knows, what it was asked, and how it misbehaves.

    Attributes:
        repositories: By id.
        requests: Method, path and `Range` of each request, in their order.
        tokens: Every `Authorization` that came, with the first part of the path that it came to.
        cut_after: File names whose next answer breaks off after so many bytes.
        resets: Whether a broken connection is reset rather than closed.
        stalls: Whether a broken connection stays open, and silent, until `ended`.
        stalled: Set where one does.
        ended: Set at the end.
        url: Where it listens.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    tokens: set[tuple[str, str]] = field(default_factory=set)
    cut_after: dict[str, int] = field(default_factory=dict)
    resets: bool = False
    stalls: bool = False
    stalled: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def add(self, model: str, files: Mapping[str, bytes] | None = None) -> Repository:
        """Makes a repository, with one commit on the branch "main"."""
        repository = self.repositories[model] = Repository()
        if files is not None:
            repository.commit(files)
        return repository

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for, in the order of the requests."""
        paths = [path for method, path, _ in self.requests if method == "GET"]
        pattern = re.compile(r"/(?:large/)?[^/]+/[^/]+/(?:resolve/)?[0-9a-f]{40}/(.+)")
        return [match[1] for path in paths if (match := pattern.fullmatch(path))]

    @contextmanager
    def serve(self) -> Iterator[StandInHub]:
        """Listens on a free port of loopback meanwhile."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = False
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            self.ended.set()
            server.shutdown()
            server.server_close()
            thread.join()


class _Refused(Exception):
    """An answer without content: status and error code."""


def _handler(hub: StandInHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, *_: Any) -> None:
            pass

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range", "")))
            if token := self.headers.get("Authorization"):
                hub.tokens.add((path.split("/")[1], token))
            try:
                if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path):
                    self._send(json.dumps(_describe(hub, *match.groups())).encode(), {})
                elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
                    self._send_file(*match.groups())
                elif match := re.fullmatch(r"/large/([^/]+/[^/]+)/(\w+)/(.+)", path):
                    model, commit, name = match.groups()
                    self._send(hub.repositories[model].commits[commit][name], {}, name)
                else:
                    raise _Refused(404, "EntryNotFound")
            except _Refused as refused:
                status, code = refused.args
                self._send(b"", {"X-Error-Code": code}, status=status)

        def _send_file(self, model: str, commit: str, name: str) -> None:
            files = _repository(hub, model).commits[commit]
            if name not in files:
                raise _Refused(404, "EntryNotFound")
            etag = hashlib.sha256(files[name]).hexdigest()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
            if len(files[name]) <= LARGE_BYTES:
                self._send(files[name], headers, name)
                return
            headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(files[name]))}
            elsewhere = hub.url.replace("127.0.0.1", "localhost")  # Another host, as CDNs are.
            headers["Location"] = f"{elsewhere}/large/{model}/{commit}/{name}"
            self._send(b"", headers, status=302)

        def _send(
            self, content: bytes, headers: Mapping[str, str], name: str = "", status: int = 200
        ) -> None:
            total = len(content)
            if span := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
                content, status = content[int(span[1]) :], 206
                headers = {
                    **headers,
                    "Content-Range": f"bytes {span[1]}-{total - 1}/{total}",
                }
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            length = hub.cut_after.pop(name, None)
            self.wfile.write(content[:length])
            if length is not None:
                self.wfile.flush()
                if hub.stalls:
                    hub.stalled.set()
                    hub.ended.wait()
                if hub.resets:
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.connection.close()

    return Handler


def _repository(hub: StandInHub, model: str) -> Repository:
    repository = hub.repositories.get(model)
    if repository is None:
        raise _Refused(404, "RepoNotFound")
    if repository.refusal:
        raise _Refused(*repository.refusal)
    return repository


def _describe(hub: StandInHub, model: str, what: str, revision: str) -> Any:
    """A revision's commit, or the listing of its files."""
    repository = _repository(hub, model)
    commit = repository.refs.get(revision, revision)
    if commit not in repository.commits:
        raise _Refused(404, "RevisionNotFound")
    files = repository.commits[commit]
    if what == "revision":
        siblings = [{"rfilename": name} for name in files]
        return {"id": model, "modelId": model, "sha": commit, "siblings": siblings}
    sizes = {name: len(content) for name, content in files.items()} | repository.listed
    oid = hashlib.sha1().hexdigest()
    return [
        {"type": "file", "path": name, "size": size, "oid": oid} for name, size in sizes.items()
    ]
