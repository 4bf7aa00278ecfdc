"""A Hub on the loopback interface: what huggingface_hub needs to publish a model and load it back.

    with HubServer() as hub:  # HF_ENDPOINT=hub.endpoint, HF_TOKEN=hub.token for the client
        ...

It speaks the client's protocol: repos/create, validate-yaml, preupload, commit (NDJSON with the contents of all files),
model info, tree and resolve. Writing needs the token.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

USER = "tester"


class HubError(Exception):
    """An answer other than 200; the client reads `code` from X-Error-Code."""

    def __init__(self, status: HTTPStatus, code: str, message: str, **details: Any):
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **details}


class HubServer:
    """The server's state, and its routes as methods, which take the request's body and what the path matched."""

    def __init__(self):
        self.commits: dict[str, list[dict[str, bytes]]] = {}  # of each repository: contents by path, newest last
        self.token = f"hf_{secrets.token_hex(17)}"
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def at(self, name: str, revision: str = "main") -> tuple[str, dict[str, bytes]]:
        """Hash and files of a commit."""
        for number, files in reversed([*enumerate(self.commits.get(name, []))]):
            sha = hashlib.sha1(f"{name} {number}".encode()).hexdigest()
            if revision in ("main", sha):
                return sha, files
        raise HubError(HTTPStatus.NOT_FOUND, "RepoNotFound", f"no repository {name} at {revision}")

    def who_am_i(self, body: bytes) -> dict[str, Any]:
        return {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def validate_card(self, body: bytes) -> dict[str, Any]:
        return {"errors": [], "warnings": []}

    def create(self, body: bytes) -> dict[str, Any]:
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        url = {"url": f"{self.endpoint}/{name}", "name": name}
        if name in self.commits:
            raise HubError(HTTPStatus.CONFLICT, "RepoExists", f"{name} exists", **url)
        self.commits[name] = [{}]
        return url

    def preupload(self, body: bytes, name: str, revision: str) -> dict[str, Any]:
        self.at(name, revision)
        paths = [file["path"] for file in json.loads(body)["files"]]
        return {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for p in paths]}

    def commit(self, body: bytes, name: str, revision: str) -> dict[str, Any]:
        files = dict(self.at(name, revision)[1])
        for operation in map(json.loads, body.splitlines()):
            if operation["key"] == "file":
                files[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
            elif operation["key"] != "header":
                raise HubError(HTTPStatus.BAD_REQUEST, "BadRequest", f"unknown operation {operation['key']}")
        self.commits[name].append(files)
        sha, _ = self.at(name)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.endpoint}/{name}/commit/{sha}"}

    def info(self, body: bytes, name: str) -> dict[str, Any]:
        sha, files = self.at(name)
        siblings = [{"rfilename": path} for path in sorted(files)]
        return {"id": name, "modelId": name, "sha": sha, "private": False, "tags": [], "siblings": siblings}

    def tree(self, body: bytes, name: str, revision: str, folder: str | None = None) -> list[dict[str, Any]]:
        files = [item for item in sorted(self.at(name, revision)[1].items()) if item[0].startswith(folder or "")]
        if not files:
            raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", f"no {folder} in {name}")
        return [{"type": "file", "path": path, "size": len(file), "oid": git_hash(file)} for path, file in files]


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


NAME, REVISION = r"([\w.-]+/[\w.-]+)", r"([^/]+)"
ROUTES: list[tuple[str, str, Callable, bool]] = [  # method, path, route, whether it needs the token
    ("GET", r"/api/whoami-v2", HubServer.who_am_i, True),
    ("POST", r"/api/validate-yaml", HubServer.validate_card, False),
    ("POST", r"/api/repos/create", HubServer.create, True),
    ("POST", rf"/api/models/{NAME}/preupload/{REVISION}", HubServer.preupload, True),
    ("POST", rf"/api/models/{NAME}/commit/{REVISION}", HubServer.commit, True),
    ("GET", rf"/api/models/{NAME}", HubServer.info, False),
    ("GET", rf"/api/models/{NAME}/tree/{REVISION}(?:/(.+))?", HubServer.tree, False),
]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        try:
            if match := re.fullmatch(rf"/{NAME}/resolve/{REVISION}/(.+)", path):
                self._resolve(*match.groups())
            else:
                self._send(HTTPStatus.OK, json.dumps(self._call(path, body)).encode())
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            self._send(error.status, json.dumps(error.body).encode(), **headers)

    do_HEAD = do_POST = do_GET

    def _call(self, path: str, body: bytes) -> Any:
        for method, pattern, route, needs_token in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                if needs_token and self.headers.get("authorization") != f"Bearer {self.hub.token}":
                    raise HubError(HTTPStatus.UNAUTHORIZED, "Unauthorized", "this needs the token")
                return route(self.hub, body, *match.groups())
        raise HubError(HTTPStatus.NOT_FOUND, "NotFound", f"no route {self.command} {path}")

    def _resolve(self, name: str, revision: str, path: str) -> None:
        sha, files = self.hub.at(name, revision)
        headers = {"X-Repo-Commit": sha}
        if path in files:
            self._send(HTTPStatus.OK, files[path], ETag=f'"{git_hash(files[path])}"', **headers)
        else:
            self._send(HTTPStatus.NOT_FOUND, b"{}", **{"X-Error-Code": "EntryNotFound"}, **headers)

    def _send(self, status: HTTPStatus, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
