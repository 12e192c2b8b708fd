"""A stand-in for the hub's endpoints on 127.0.0.1, which counts what it sends."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<what>revision|tree)/(?P<revision>[^/?]+)")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
_CHUNK = 64 * 1024


@dataclass
class FakeRepo:
    """One repository, and how it misbehaves."""

    files: dict[str, bytes]
    commit: str = COMMIT
    revisions: tuple[str, ...] = ("main",)
    error: tuple[int, dict[str, str]] | None = None
    """Status and headers that answer every request for a file."""
    api_error: tuple[int, dict[str, str]] | None = None
    """Status and headers that answer every request for the listing."""
    api_body: bytes | None = None
    """Sent in the listing's place."""
    tells_sizes: bool = True
    listed_sizes: dict[str, int] = field(default_factory=dict)
    """Sizes that the listing gets wrong."""
    ignores_range: bool = False
    weights_at: str | None = None
    """Another server, to which requests for safetensors files are redirected."""
    tells_digests: bool = False
    """Whether the listing has the sha256 of safetensors files, as it has of what lies in LFS."""
    flips: int = 0
    """Whole safetensors files that are sent with a bit flipped in their last byte."""
    breaks: int = 0
    """Answers to ranges that are cut off in their middle."""


@dataclass
class Request:
    """One request; it is noted before its answer, which a client may have before we go on."""

    method: str
    path: str
    asked_range: str | None
    token: str | None
    sent_bytes: int = 0


class FakeHub(ThreadingHTTPServer):
    """The server; `repos` by id, `requests` in the order in which they began."""

    daemon_threads = True
    # http.server would wait for clients that keep their connection.
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, FakeRepo] = {}
        self.requests: list[Request] = []

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def sent_bytes(self, suffix: str) -> int:
        """Bytes sent of files whose path ends so."""
        return sum(one.sent_bytes for one in self.requests if one.path.endswith(suffix))

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up on purpose here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> FakeHub:
        return cast("FakeHub", self.server)

    def setup(self) -> None:
        # Small buffers, so that what is counted as sent is about what was read.
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHUNK)
        super().setup()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        match = _API.fullmatch(path) or _FILE.fullmatch(path)
        repo = self.hub.repos.get(match["repo"]) if match else None
        if match is None or repo is None:
            self.answer(404, {"X-Error-Code": "RepoNotFound"})
        elif unquote(match["revision"]) not in {repo.commit, *repo.revisions}:
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/"):
            self.answer_api(repo, match["what"])
        else:
            self.answer_file(repo, match["file"])

    def answer_api(self, repo: FakeRepo, what: str) -> None:
        if repo.api_error:
            self.answer(*repo.api_error)
            return
        files = [
            {
                ("path" if what == "tree" else "rfilename"): name,
                "type": "file",
                "oid": hashlib.sha1(content).hexdigest(),
            }
            | ({"size": repo.listed_sizes.get(name, len(content))} if repo.tells_sizes else {})
            | ({"lfs": _lfs(content)} if repo.tells_digests and name.endswith("tensors") else {})
            for name, content in repo.files.items()
        ]
        listing: object = {"id": "org/name", "sha": repo.commit, "siblings": files}
        body = json.dumps(files if what == "tree" else listing).encode()
        self.answer(200, {"Content-Type": "application/json"}, repo.api_body or body)

    def answer_file(self, repo: FakeRepo, file: str) -> None:
        content = repo.files.get(file)
        if repo.error:
            self.answer(*repo.error)
            return
        if content is None:
            self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.commit})
            return
        if repo.weights_at and file.endswith(".safetensors"):
            self.answer(302, {"Location": f"{repo.weights_at}{self.path}"})
            return
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": repo.commit}
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        if asked is None or repo.ignores_range:
            if repo.flips and self.command == "GET" and file.endswith(".safetensors"):
                repo.flips -= 1
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.answer(200, headers, content)
            return
        begin, end = int(asked[1]), min(int(asked[2]) + 1, len(content))
        if begin >= end:
            self.answer(416, {"Content-Range": f"bytes */{len(content)}"})
            return
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        cut = repo.breaks > 0
        repo.breaks -= cut
        self.answer(206, headers, content[begin:end], cut=cut)

    def answer(
        self, status: int, headers: dict[str, str], body: bytes = b"", *, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        request = Request(
            method=self.command,
            path=urlsplit(self.path).path,
            asked_range=self.headers.get("Range"),
            token=self.headers.get("Authorization"),
        )
        self.hub.requests.append(request)
        try:
            self.end_headers()
            if self.command == "GET":
                length = len(body) // 2 if cut else len(body)
                for begin in range(0, length, _CHUNK):
                    chunk = body[begin : min(begin + _CHUNK, length)]
                    request.sent_bytes += len(chunk)
                    self.connection.sendall(chunk)
        finally:
            self.close_connection = cut or self.close_connection


def _lfs(content: bytes) -> dict[str, object]:
    digest = hashlib.sha256(content).hexdigest()
    return {"sha256": digest, "size": len(content), "pointerSize": 130}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A running hub."""
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
