"""A small Hugging Face hub on this machine: enough of its HTTP interface for the real `huggingface_hub` and `datasets`.

Repositories are mappings from file names to bytes, one per commit. Uploads arrive as one commit, small files in it and large
ones through the LFS endpoints.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

TOKEN = "hf_secret"
API = re.compile(
    r"/api/datasets/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree|paths-info|refs|preupload|commit)(?:/(?P<rest>.*))?)?$"
)
RESOLVE = re.compile(r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)$")
LFS_BATCH = re.compile(r"/datasets/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch$")


@dataclass
class Repo:
    """Files by commit, commits by branch or tag."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Add a commit with these files besides those of the branch, and move the branch there."""
        whole = {**self.commits.get(self.refs.get(ref, ""), {}), **files}
        sha = hashlib.sha1(repr((sorted(whole.items()), len(self.commits))).encode()).hexdigest()
        self.commits[sha], self.refs[ref] = whole, sha
        return sha

    def sha_of(self, revision: str) -> str | None:
        revision = urllib.parse.unquote(revision)
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class Hub(http.server.ThreadingHTTPServer):
    """The server and what it holds."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, files: dict[str, str | bytes], **options: Any) -> Repo:
        repo = self.repos.setdefault(name, Repo(**options))
        repo.commit({file: text.encode() if isinstance(text, str) else text for file, text in files.items()})
        return repo


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        self.server.requests.append(f"{self.command} {self.path}")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if found := RESOLVE.match(path):
            self.resolve(found["repo"], found["revision"], found["file"])
        elif found := API.match(path):
            self.api(found["repo"], found["what"], found["rest"] or "")
        elif path == "/api/whoami-v2":
            self.answer(
                {"name": "someone", "type": "user"} if self.token_is_right() else {},
                200 if self.token_is_right() else 401,
            )
        else:
            self.answer({"error": "Not Found"}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            if not self.token_is_right():
                self.answer({"error": "Invalid token"}, 401)
                return
            if name not in self.server.repos:
                is_private = bool(asked.get("private")) or asked.get("visibility") == "private"
                self.server.repos[name] = Repo(private=is_private)
                self.server.repos[name].commit({".gitattributes": b""})
            self.answer({"url": f"{self.server.url}/datasets/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif found := LFS_BATCH.match(path):
            actions = [
                {**item, "actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": actions}, kind="application/vnd.git-lfs+json")
        elif found := API.match(path):
            self.api(found["repo"], found["what"], found["rest"] or "", body)
        else:
            self.answer({"error": "Not Found"}, 404)

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def api(self, name: str, what: str | None, rest: str, body: bytes = b"") -> None:
        repo = self.allowed(name)
        if repo is None:
            return
        revision, _, inner = rest.partition("/")
        sha = repo.sha_of(revision or "main")
        if sha is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files = repo.commits[sha]
        if what in (None, "revision"):
            siblings = [{"rfilename": file} for file in files]
            self.answer(
                {"id": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": [], "downloads": 0}
            )
        elif what == "refs":
            branches = [
                {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha} for ref, sha in repo.refs.items()
            ]
            self.answer({"branches": branches, "tags": [], "converts": []})
        elif what == "tree":
            inside = [file for file in files if not inner or file.startswith(inner + "/")]
            if inner and not inside:
                self.refuse(404, "EntryNotFound", f"{inner} does not exist")
                return
            self.answer(_entries(files, inside, inner, "recursive=true" in self.path.lower()))
        elif what == "paths-info":
            asked = urllib.parse.parse_qs(body.decode())["paths"] if body[:1] != b"{" else json.loads(body)["paths"]
            self.answer([entry for path in asked for entry in _entry(files, path.strip("/"))])
        elif what == "preupload":
            files_asked = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".parquet") else "regular",
                    "shouldIgnore": False,
                }
                for file in files_asked
            ]
            self.answer({"files": modes})
        elif what == "commit":
            added = {}
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    added[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    added[line["value"]["path"]] = self.server.objects[line["value"]["oid"]]
            sha = repo.commit(added, urllib.parse.unquote(revision))
            self.answer(
                {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/datasets/{name}/commit/{sha}"}
            )

    def resolve(self, name: str, revision: str, file: str) -> None:
        repo = self.allowed(name)
        if repo is None:
            return
        sha = repo.sha_of(revision)
        if sha is None:
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        elif file not in repo.commits[sha]:
            self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        else:
            content = repo.commits[sha][file]
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
            etag = hashlib.sha1(content).hexdigest()
            headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
            self.send(206 if start else 200, content[start:], headers)

    def allowed(self, name: str) -> Repo | None:
        """The repository, or None after a refusal. One that is private is not there for those who may not see it."""
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.token_is_right()):
            self.refuse(401, "RepoNotFound", "Repository not found")
            return None
        if repo.gated and not self.token_is_right():
            self.refuse(403, "GatedRepo", f"Access to dataset {name} is restricted")
            return None
        return repo

    def token_is_right(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        self.answer({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    def answer(
        self, content: Any, status: int = 200, headers: dict[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        self.send(status, json.dumps(content).encode(), {"Content-Type": kind, **(headers or {})})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(files: dict[str, bytes], path: str) -> list[dict[str, Any]]:
    if path in files:
        content = files[path]
        return [{"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}]
    is_folder = any(file.startswith(path + "/") for file in files)
    return [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40}] if is_folder else []


def _entries(files: dict[str, bytes], inside: list[str], folder: str, recursive: bool) -> list[dict[str, Any]]:
    depth = folder.count("/") + 1 if folder else 0
    paths = {"/".join(file.split("/")[: n + 1]) for file in inside for n in range(depth, file.count("/") + 1)}
    if not recursive:
        paths = {path for path in paths if path.count("/") == depth}
    return [entry for path in sorted(paths) for entry in _entry(files, path)]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that listens on a port of its own."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
