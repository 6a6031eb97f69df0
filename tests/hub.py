"""A server on loopback that speaks as much of the Hugging Face hub's API as huggingface_hub asks.

Of the API's documentation (huggingface.co/docs/hub/api) and of git-lfs's (docs/api/batch.md). Files
are regular ones or git-lfs's, not Xet's. Everything is in memory.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

Files = dict[str, bytes]

ABSENT = "the hub (no folder, and nothing of it in the hub's cache, with HF_HUB_OFFLINE set)"
"""Of a list of places, in tests, where nothing is downloaded."""


def files_of(folder: Path) -> Files:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@dataclasses.dataclass
class Repository:
    """Commits, and what names them; who may read it."""

    refs: dict[str, str]
    commits: dict[str, Files]
    gated: bool = False
    private: bool = False

    def add(self, ref: str, files: Files) -> str:
        told = "".join(f"{name} {hashlib.sha1(x).hexdigest()}" for name, x in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)} {told}".encode()).hexdigest()
        self.commits[sha], self.refs[ref] = dict(files), sha
        return sha


@dataclasses.dataclass
class Account:
    """What a token may do."""

    name: str = "me"
    role: str = "write"
    scoped: tuple[str, ...] = ()  # namespaces that a fine-grained one may write to
    orgs: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name -> role in it
    reads: bool = True  # gated repositories


class Hub:
    """The server's state.

    Attributes:
        repositories: by name.
        accounts: token -> what it may do.
        asked: ("GET /path", Range) of each request.
        faults: (part of "METHOD /path", what to answer in its place) each used once: a status, or
            how many bytes of the body are sent before the connection breaks.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.accounts: dict[str, Account] = {}
        self.asked: list[tuple[str, str]] = []
        self.faults: list[tuple[str, int]] = []
        self.objects: Files = {}
        self.lock = threading.Lock()
        self.url = ""

    def add(self, name: str, folder: Path, ref: str = "main") -> str:
        """A commit with a folder's files; returns its hash."""
        with self.lock:
            repository = self.repositories.setdefault(name, Repository({}, {}))
            return repository.add(ref, files_of(folder))

    def fetched(self, name: str = "") -> list[str]:
        """Files that were downloaded, of one repository or of all."""
        start = f"GET /{name}"
        found = [re.fullmatch(r".*/resolve/[^/]+/(.*)", x) for x, _ in self.asked if start in x]
        return sorted(unquote(match[1]) for match in found if match)

    def fault(self, request: str) -> int | None:
        with self.lock:
            for i, (part, value) in enumerate(self.faults):
                if part in request:
                    del self.faults[i]
                    return value
        return None


class Refused(Exception):
    """An answer that is an error: status, X-Error-Code, X-Error-Message."""

    def __init__(self, status: int, code: str = "", message: str = "", body: bytes = b""):
        super().__init__(status)
        self.status, self.body = status, body
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.answer()

        do_HEAD = do_POST = do_PUT = do_GET

        def answer(self) -> None:
            path, ranged = urlsplit(self.path).path, self.headers.get("Range", "")
            length = int(self.headers.get("Content-Length", 0))
            self.body = self.rfile.read(length)
            request = f"{self.command} {path}"
            with hub.lock:
                hub.asked.append((request, ranged))
            fault = hub.fault(request)
            try:
                if fault in (429, 500, 503):
                    raise Refused(fault)
                status, headers, data = self.found(path, ranged)
            except Refused as error:
                status, headers, data = error.status, error.headers, error.body
                fault = None
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data if fault is None else data[:fault])
            if fault is not None:
                self.close_connection = True

        def found(self, path: str, ranged: str) -> tuple[int, dict[str, str], bytes]:
            if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.*)", path):
                return self.file(match[1], unquote(match[2]), unquote(match[3]), ranged)
            if match := re.fullmatch(r"/lfs/(\w+)", path):
                assert hashlib.sha256(self.body).hexdigest() == match[1]
                hub.objects[match[1]] = self.body
                return 200, {}, b""
            data = json.dumps(self.api(path)).encode()
            return 200, {"Content-Type": "application/json"}, data

        def account(self) -> Account | None:
            given = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if given and given not in hub.accounts:
                raise Refused(401, "", "Invalid credentials in Authorization header")
            return hub.accounts.get(given)

        def repository(self, name: str) -> Repository:
            account, found = self.account(), hub.repositories.get(name)
            if found is None or (found.private and not account):
                raise Refused(404 if account else 401, "RepoNotFound", "Repository not found")
            return found

        def commit(self, name: str, revision: str) -> tuple[str, Files]:
            repository = self.repository(name)
            sha = repository.refs.get(revision, revision)
            if sha not in repository.commits:
                raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return sha, repository.commits[sha]

        def file(
            self, name: str, revision: str, path: str, ranged: str
        ) -> tuple[int, dict[str, str], bytes]:
            sha, files = self.commit(name, revision)
            if hub.repositories[name].gated and not ((who := self.account()) and who.reads):
                raise Refused(403 if self.account() else 401, "GatedRepo", "Access is restricted.")
            if path not in files:
                raise Refused(404, "EntryNotFound", "Entry not found")
            data = files[path]
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": sha}
            headers |= {"Content-Length": str(len(data)), "Accept-Ranges": "bytes"}
            if not ranged:
                return 200, headers, data
            start = int(ranged.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            headers["Content-Length"] = str(len(data) - start)
            return 206, headers, data[start:]

        def api(self, path: str) -> Any:
            given = self.body.split(b"\n") if path.startswith("/api/models") else [self.body]
            lines = [json.loads(line) for line in given if line]
            if path == "/api/whoami-v2":
                return self.whoami()
            if path == "/api/validate-yaml":
                return {"errors": [], "warnings": []}
            if path == "/api/repos/create":
                return self.create(lines[0])
            if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
                self.writes(match[1])
                return {"objects": [upload(hub, x["oid"], x["size"]) for x in lines[0]["objects"]]}
            match = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/([\w-]+)(?:/([^/]+))?)?", path)
            if match is None:
                raise Refused(404, "", f"no {path}")
            name, verb, revision = match[1], match[2], unquote(match[3] or "main")
            if verb == "auth-check":
                self.repository(name)
                self.writes(name)
                return {}
            if verb == "preupload":
                self.writes(name)
                return {"files": [self.mode(file["path"]) for file in lines[0]["files"]]}
            if verb == "commit":
                return self.committed(name, revision, lines)
            sha, files = self.commit(name, revision)
            if verb == "tree":
                return [entry(name, data) for name, data in files.items()]
            siblings = [{"rfilename": name} for name in files]
            repository = hub.repositories[name]
            return {
                "id": name,
                "sha": sha,
                "siblings": siblings,
                "private": repository.private,
                "gated": repository.gated,
            }

        def whoami(self) -> dict[str, Any]:
            who = self.account()
            if who is None:
                raise Refused(401, "", "Invalid username or password.")
            entities = [
                {"entity": {"type": "user", "name": name}, "permissions": ["repo.write"]}
                for name in who.scoped
            ]
            token = {"displayName": "t", "role": who.role, "fineGrained": {"scoped": entities}}
            orgs = [{"name": name, "roleInOrg": role} for name, role in who.orgs.items()]
            auth = {"type": "access_token", "accessToken": token}
            return {"type": "user", "name": who.name, "orgs": orgs, "auth": auth}

        def writes(self, name: str) -> None:
            who = self.account()
            namespace = name.split("/")[0]
            may = who is not None and (
                namespace in who.scoped
                if who.role == "fineGrained"
                else who.role == "write" and namespace in (who.name, *who.orgs)
            )
            if not may:
                raise Refused(403, "", "You don't have the rights to write to this repository")

        def create(self, asked: Mapping[str, Any]) -> dict[str, Any]:
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.writes(name)
            if name in hub.repositories:
                body = json.dumps({"url": f"{hub.url}/{name}"}).encode()
                raise Refused(409, "", "You already created this model repo", body)
            private = bool(asked.get("private") or asked.get("visibility") == "private")
            hub.repositories[name] = Repository({}, {}, private=private)
            hub.repositories[name].add("main", {".gitattributes": b""})
            return {"url": f"{hub.url}/{name}", "id": name}

        def mode(self, path: str) -> dict[str, Any]:
            how = "lfs" if path.endswith((".safetensors", ".bin")) else "regular"
            return {"path": path, "uploadMode": how, "shouldIgnore": False}

        def committed(self, name: str, ref: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
            self.writes(name)
            _, files = self.commit(name, ref)
            files = dict(files)
            for line in lines:
                value = line["value"]
                if line["key"] == "deletedFile":
                    del files[value["path"]]
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
            sha = hub.repositories[name].add(ref, files)
            return {"commitUrl": f"{hub.url}/{name}/commit/{sha}", "commitOid": sha}

    return Handler


def entry(path: str, data: bytes) -> dict[str, Any]:
    """A file as the API lists it."""
    oid = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    return {"type": "file", "path": path, "size": len(data), "oid": oid}


def upload(hub: Hub, oid: str, size: int) -> dict[str, Any]:
    """What git-lfs's batch API says of an object: nothing to do if it is there."""
    todo = {"upload": {"href": f"{hub.url}/lfs/{oid}"}}
    return {"oid": oid, "size": size} | ({} if oid in hub.objects else {"actions": todo})


@contextlib.contextmanager
def serving(cache: Path, patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub asks in this process, with an empty cache and no login.

    Args:
        cache: folder.
        patch: the test's own: two would not be undone in their order.
    """
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True)
    thread.start()
    patch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    patch.delenv("HF_TOKEN", raising=False)
    huggingface_hub.utils.disable_progress_bars()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
