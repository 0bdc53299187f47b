"""A server that answers as the Hugging Face hub does, as far as reading a data set or tokenizer at a commit needs it.

What it serves is a folder of repositories laid out as on the hub; what was asked is remembered.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMITS = ("1" * 40, "2" * 40)
"""Of every repository: an older commit and the newest, which is `main`."""
_API = re.compile(
    r"/api/(?:datasets|models)/(?P<repo>[^/]+/[^/]+)(/(?P<what>revision|tree|paths-info)/(?P<revision>[^/]+))?"
)
_FILE = re.compile(r"(?:/datasets)?/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class FakeHub:
    """Serves `<folder>/<commit>/<owner>/<name>/…`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        """Method and path of every request, and the range of bytes where there was one."""
        self.url = ""

    @contextmanager
    def served(self) -> Iterator["FakeHub"]:
        """Answers on a port of its own while the block runs."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def root(self, repo: str, revision: str | None) -> tuple[Path | None, str]:
        """The folder of a repository at a revision, and the commit that it is."""
        commit = COMMITS[-1] if revision in (None, "main") else str(revision)
        root = self.folder / commit / repo
        return (root if root.is_dir() else None), commit


def _entry(root: Path, path: Path) -> dict[str, object]:
    kind = "directory" if path.is_dir() else "file"
    return {"type": kind, "path": path.relative_to(root).as_posix(), "size": path.stat().st_size, "oid": "0" * 40}


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            """Says nothing: a test's output is not the place."""

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            url = urlsplit(self.path)
            hub.asked.append(f"{self.command} {unquote(url.path)} {self.headers.get('Range', '')}".strip())
            file, api = _FILE.fullmatch(unquote(url.path)), _API.match(unquote(url.path))
            if file:
                self._file(file["repo"], file["revision"], file["path"])
            elif api:
                self._api(api["repo"], api["what"], api["revision"], unquote(url.path)[api.end() :].strip("/"))
            else:
                self._send(404, b"{}")

        def _api(self, repo: str, what: str | None, revision: str | None, path: str) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            root, commit = hub.root(repo, revision)
            if root is None:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif what in (None, "revision"):
                siblings = [
                    {"rfilename": file.relative_to(root).as_posix()} for file in root.rglob("*") if file.is_file()
                ]
                self._json({"id": repo, "sha": commit, "siblings": siblings, "private": False, "tags": []})
            elif what == "tree":
                self._json([_entry(root, found) for found in sorted((root / path).rglob("*"))])
            else:
                asked = parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
                self._json([_entry(root, root / name) for name in asked if (root / name).exists()])

        def _file(self, repo: str, revision: str, path: str) -> None:
            root, commit = hub.root(repo, revision)
            if root is None or not (root / path).is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                return
            data = (root / path).read_bytes()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{commit}{len(data)}"', "Accept-Ranges": "bytes"}
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked:
                first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                data = data[first : last + 1]
            self._send(206 if asked else 200, data, headers)

        def _json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, code: int, data: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    return Handler
