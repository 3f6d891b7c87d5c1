"""A Hub of a few routes, on this machine: what huggingface_hub asks for to list a repository and fetch its files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
GATED, OPENED = "someone/gated", "someone/opened"
TOKEN = "hf_letmein"


@contextmanager
def hub(repos: Mapping[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as repositories with one commit, called main and v1; yields the address and the log of requests.

    `someone/gated` shows its files and gives them to nobody, `someone/opened` to who has the token.
    """
    log: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            log.append(f"{self.command} {'/'.join(parts)}")
            api = parts[:2] == ["api", "models"]
            owner, name, kind, revision, *inner = [*(parts[2:] if api else parts), "", "", ""][: len(parts) + 1]
            folder = repos.get(f"{owner}/{name}")
            if folder is None:
                return self.answer(404, b"", X_Error_Code="RepoNotFound")
            if revision not in ("main", "v1", COMMIT):
                return self.answer(404, b"", X_Error_Code="RevisionNotFound")
            files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
            if api:
                infos = [{"rfilename": n} for n in files] if kind == "revision" else None
                tree = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": oid(p)} for n, p in files.items()]
                body = tree if infos is None else {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": infos}
                return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
            closed = {GATED: True, OPENED: self.headers.get("Authorization") != f"Bearer {TOKEN}"}
            if closed.get(f"{owner}/{name}"):
                return self.answer(403, b"", X_Error_Code="GatedRepo")
            path = files.get("/".join(p for p in inner if p))
            if path is None:
                return self.answer(404, b"", X_Error_Code="EntryNotFound")
            return self.answer(200, path.read_bytes(), ETag=f'"{oid(path)}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
