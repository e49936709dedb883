"""A Hugging Face hub on this machine: the endpoints that downloading files and committing a folder need.

As huggingface_hub of 2024 to 2026 calls them: https://huggingface.co/docs/hub/api and the client's ``_commit_api``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

TOKEN = "hf_" + "s3cret" * 6


@dataclass
class Hub:
    """``repositories``: {owner/name: {branch: {path: content}}}. ``token``: required to write; empty: none."""

    url: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    token: str = TOKEN
    uploaded: dict[str, bytes] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    commits: int = 0

    def add(self, repository: str, files: dict[str, bytes], branch: str = "main") -> None:
        self.repositories.setdefault(repository, {}).setdefault(branch, {}).update(files)


@contextmanager
def hub_server(monkeypatch: pytest.MonkeyPatch, home) -> Iterator[Hub]:
    """Run one, and let the client of this process use it, with its cache in ``home``."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs the hub extra")
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HOME", str(home))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        try:
            yield hub
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.do_HEAD(body=True)

    def do_HEAD(self, body: bool = False) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            branch = parts[5] if parts[4:5] == ["revision"] else "main"
            self._info("/".join(parts[2:4]), branch)
            return
        name = "/".join(parts[:2])
        branches = self.hub.repositories.get(name)
        if branches is None:
            self._reply(404, b"", body, {"X-Error-Code": "RepoNotFound"})
            return
        branch = parts[3]
        files = branches.get(branch) or branches.get(self._branch_of(name, branch))
        path = "/".join(parts[4:]).replace("%3D", "=")
        if files is None or path not in files:
            code = "RevisionNotFound" if files is None else "EntryNotFound"
            self._reply(404, b"", body, {"X-Error-Code": code, "X-Repo-Commit": _commit(branches, branch)})
            return
        etag = hashlib.sha256(files[path]).hexdigest()
        self._reply(200, files[path], body, {"ETag": f'"{etag}"', "X-Repo-Commit": _commit(branches, branch)})

    def _branch_of(self, name: str, commit: str) -> str:
        branches = self.hub.repositories[name]
        return next((b for b in branches if _commit(branches, b) == commit), "")

    def _info(self, name: str, branch: str) -> None:
        branches = self.hub.repositories.get(name)
        if branches is None or branch not in branches:
            self._reply(404, b"{}", True, {"X-Error-Code": "RepoNotFound"})
            return
        siblings = [
            {
                "rfilename": path,
                "size": len(content),
                "blobId": hashlib.sha1(content).hexdigest(),
                "lfs": {
                    "sha256": hashlib.sha256(content).hexdigest(),
                    "size": len(content),
                    "pointerSize": 100,
                },
            }
            for path, content in branches[branch].items()
        ]
        self._json({"id": name, "sha": _commit(branches, branch), "siblings": siblings})

    def do_POST(self) -> None:
        self.hub.requests.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0].strip("/")
        parts = path.split("/")
        if path == "api/validate-yaml":
            self._json({"errors": [], "warnings": []})
            return
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._reply(401, b'{"error": "Invalid credentials"}', True, {})
            return
        if path == "api/repos/create":
            wanted = json.loads(body)
            name = (
                f"{wanted['organization']}/{wanted['name']}" if "organization" in wanted else wanted["name"]
            )
            known = name in self.hub.repositories
            self.hub.repositories.setdefault(name, {"main": {}})
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.hub.private.add(name)
            self._json({"url": f"{self.hub.url}/{name}"}, 409 if known else 200)
        elif parts[4:5] == ["branch"]:
            branches = self.hub.repositories["/".join(parts[2:4])]
            known = parts[5] in branches
            branches.setdefault(parts[5], dict(branches["main"]))
            self._json({}, 409 if known else 200)
        elif parts[4:5] == ["preupload"]:
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    "actions": {"upload": {"href": f"{self.hub.url}/upload/{o['oid']}"}},
                }
                for o in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif parts[4:5] == ["commit"]:
            self._commit("/".join(parts[2:4]), parts[5], body)
        else:
            self._reply(404, b"", True, {})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        digest = hashlib.sha256(content).hexdigest()
        assert self.path.endswith(digest)
        self.hub.uploaded[digest] = content
        self._reply(200, b"", True, {})

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        files = self.hub.repositories[name][branch]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploaded[value["oid"]]
        self.hub.commits += 1
        oid = _commit(self.hub.repositories[name], branch)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    def _json(self, content: object, status: int = 200) -> None:
        self._reply(status, json.dumps(content).encode(), True, {"Content-Type": "application/json"})

    def _reply(self, status: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def _commit(branches: dict[str, dict[str, bytes]], branch: str) -> str:
    """The commit of a branch: a hash of its files."""
    content = repr(sorted((p, hashlib.sha1(c).hexdigest()) for p, c in branches.get(branch, {}).items()))
    return hashlib.sha1((branch + content).encode()).hexdigest()
