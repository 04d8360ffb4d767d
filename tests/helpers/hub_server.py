"""A Hugging Face Hub on this machine: what the real client asks of one when it fetches or uploads.

Serves folders as repositories of models and data sets alike, refuses or breaks off as told, and
records what was asked and what was uploaded. No file is answered as Xet or LFS and every upload is
told to be "regular", so the client keeps to plain HTTP and file contents inside the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Revisions = dict[str, Path]  # branch or tag to folder

_REPO = re.compile(
    r"/api/(?:models|datasets)/([^/]+/[^/]+)"
    r"(?:/(revision|tree|preupload|commit)/([^/]+)(?:/(.*))?)?$"
)
_RESOLVE = re.compile(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


@dataclass
class Refusal:
    """How to answer for a repository: an HTTP status and the Hub's own headers.

    `only_files` lets its listing pass, as the Hub does for gated models.
    """

    status: int
    code: str | None = None
    message: str | None = None
    only_files: bool = False


@dataclass
class Drop:
    """Break off in mid-file: how often, and whether with a reset or an orderly close."""

    times: int = 1
    reset: bool = False


class HubServer:
    """The Hub, in threads of this process, while in its `with` block or until `stop`.

    Attributes:
        url: for HF_ENDPOINT.
        log: every request as (method, path).
        uploads: uploaded files by repository and path.
    """

    def __init__(self, repos: dict[str, Revisions] | None = None):
        self.repos = repos or {}
        self.refusals: dict[str, Refusal] = {}
        self.drops: dict[str, Drop] = {}  # by file name
        self.log: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self.uploads: dict[str, dict[str, bytes]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Go down; connections are refused from then on."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def sent(self) -> set[str]:
        """The names of the files whose contents were asked for."""
        found = (_RESOLVE.match(path) for method, path in self.log if method == "GET")
        return {m[3] for m in found if m}


def commit_of(folder: Path) -> str:
    """The commit that a served folder stands for."""
    return hashlib.sha1(str(folder).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self._path()
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if not self._refused(repo):
                self.hub.uploads.setdefault(repo, {})
                self._json({"url": f"{self.hub.url}/{repo}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif match := _REPO.match(path):
            repo = match[1]
            if self._refused(repo):
                return
            if match[2] == "preupload":
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self._json({"files": files})
            elif match[2] == "commit":
                self._commit(repo, body)
            else:
                self._refuse(Refusal(404))
        else:
            self._refuse(Refusal(404))

    def _commit(self, repo: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.hub.uploads[repo][line["value"]["path"]] = content
            elif line["key"] != "header":
                self._refuse(Refusal(400, message=f"no {line['key']} here"))
                return
        commit = "c" * 40
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url})

    def _get(self) -> None:
        path = self._path()
        if match := _REPO.match(path):
            repo, what, revision, place = match.groups()
            folder = self._folder(repo, revision or "main", files=False)
            if folder is not None and what in (None, "revision"):
                self._json({"id": repo, "sha": commit_of(folder), "siblings": []})
            elif folder is not None:
                found = [file for file in _files(folder) if file.startswith(place or "")]
                if found:
                    self._json([_entry(folder, file) for file in found])
                else:
                    self._refuse(Refusal(404, "EntryNotFound", "Entry not found"))
        elif match := _RESOLVE.match(path):
            folder = self._folder(match[1], match[2], files=True)
            if folder is not None:
                self._file(folder, match[3])
        else:
            self._refuse(Refusal(404))

    def _folder(self, repo: str, revision: str, *, files: bool) -> Path | None:
        """What a revision stands for; None once an error was answered."""
        if self._refused(repo, files=files):
            return None
        if repo not in self.hub.repos:
            self._refuse(Refusal(404, "RepoNotFound", "Repository not found"))
            return None
        revisions = self.hub.repos[repo]
        known = revisions | {commit_of(folder): folder for folder in revisions.values()}
        if revision not in known:
            self._refuse(Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}"))
            return None
        return known[revision]

    def _file(self, folder: Path, name: str) -> None:
        if name not in _files(folder):
            self._refuse(Refusal(404, "EntryNotFound", "Entry not found"))
            return
        content = (folder / name).read_bytes()
        headers = {
            "ETag": f'"{_entry(folder, name)["oid"]}"',
            "X-Repo-Commit": commit_of(folder),
            "Accept-Ranges": "bytes",
        }
        status, start = 200, 0
        if self.command == "GET" and (asked := self.headers.get("Range")):
            self.hub.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            status = 206
        drop = self.hub.drops.get(name)
        if self.command == "GET" and drop and drop.times:
            drop.times -= 1
            self._break_off(headers, content[start:], reset=drop.reset)
        else:
            self._send(status, content[start:], headers)

    def _break_off(self, headers: dict[str, str], content: bytes, *, reset: bool) -> None:
        self._head(200, len(content), headers)
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        self.close_connection = True
        if reset:
            linger = struct.pack("ii", 1, 0)  # a close without a goodbye
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path))
        return path

    def _refused(self, repo: str, *, files: bool = True) -> bool:
        refusal = self.hub.refusals.get(repo)
        if refusal is None or (refusal.only_files and not files):
            return False
        self._refuse(refusal)
        return True

    def _refuse(self, refusal: Refusal) -> None:
        headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
        body = json.dumps({"error": refusal.message or "refused"}).encode()
        self._send(refusal.status, body, {k: v for k, v in headers.items() if v})

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._head(status, len(body), headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def _files(folder: Path) -> list[str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(str(file.relative_to(folder)) for file in files)


def _entry(folder: Path, name: str) -> dict[str, Any]:
    content = (folder / name).read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"type": "file", "path": name, "size": len(content), "oid": oid}
