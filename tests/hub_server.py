"""A Hub on the loopback interface, as much of it as huggingface_hub needs to publish a model and load it back.

    with HubServer(tmp_path) as hub:  # HF_ENDPOINT=hub.endpoint, HF_TOKEN=hub.token for the client
        ...

It speaks the client's own protocol: repos/create, validate-yaml, preupload, LFS batch and upload, commit (NDJSON),
model info, tree, and resolve with redirects to LFS objects. Every upload is checked against the hash that names it,
writing needs the token, and every commit has a hash of its contents.
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
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

USER = "tester"
BINARY_SUFFIXES = (".safetensors", ".bin", ".png", ".jpg", ".model")  # as a new repository's .gitattributes lists them
PIPELINE_TAGS = ("image-text-to-text", "image-to-text", "text-generation", "visual-question-answering")


class HubError(Exception):
    """An answer other than 200, with the code that the client reads from X-Error-Code."""

    def __init__(self, status: HTTPStatus, code: str, message: str, body: dict[str, Any] | None = None):
        super().__init__(message)
        self.status, self.code, self.body = status, code, body or {"error": message}


class Repository:
    """Files of each commit: path -> (content hash, size), newest commit last."""

    def __init__(self, name: str, private: bool):
        self.name, self.private = name, private
        self.commits: list[tuple[str, dict[str, tuple[str, int]]]] = []
        self.commit("initial commit", {})

    def commit(self, title: str, files: dict[str, tuple[str, int]]) -> str:
        parent = self.commits[-1][0] if self.commits else ""
        record = json.dumps([parent, title, sorted(files.items())])
        self.commits.append((hashlib.sha1(record.encode()).hexdigest(), files))
        return self.commits[-1][0]

    def at(self, revision: str) -> tuple[str, dict[str, tuple[str, int]]]:
        if revision == "main":
            return self.commits[-1]
        for sha, files in self.commits:
            if sha == revision:
                return sha, files
        raise HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"no revision {revision} in {self.name}")


class HubServer:
    """The server's state, and its routes as methods; `requests` records what the client asked."""

    def __init__(self, folder: Path):
        self.objects = folder / "objects"  # by SHA-256, LFS files and plain ones alike
        self.objects.mkdir(parents=True)
        self.repositories: dict[str, Repository] = {}
        self.token = f"hf_{secrets.token_hex(17)}"
        self.requests: list[str] = []
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        self.storage = (
            f"http://localhost:{server.server_port}"  # another host than the Hub's own, as the client expects
        )
        self._server = server

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def repository(self, name: str) -> Repository:
        if name not in self.repositories:
            raise HubError(HTTPStatus.NOT_FOUND, "RepoNotFound", f"no repository {name}")
        return self.repositories[name]

    def store(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        (self.objects / digest).write_bytes(content)
        return digest

    # -- routes: what the handler matched, the request's body, whether it carried the token ----------------------------

    def who_am_i(self, body: bytes) -> dict[str, Any]:
        return {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def validate_card(self, body: bytes) -> dict[str, Any]:
        errors = list(card_errors(json.loads(body)["content"]))
        if errors:
            report = {"errors": [{"message": message} for message in errors], "warnings": []}
            raise HubError(HTTPStatus.BAD_REQUEST, "BadRequest", "invalid card", report)
        return {"errors": [], "warnings": []}

    def create(self, body: bytes) -> dict[str, Any]:
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        url = {"url": f"{self.endpoint}/{name}", "name": name}
        if name in self.repositories:
            raise HubError(HTTPStatus.CONFLICT, "RepoExists", f"{name} exists", url)
        self.repositories[name] = Repository(name, bool(asked.get("private")))
        return url

    def preupload(self, body: bytes, name: str, revision: str) -> dict[str, Any]:
        self.repository(name).at(revision)
        files = json.loads(body)["files"]
        modes = ["lfs" if file["path"].endswith(BINARY_SUFFIXES) else "regular" for file in files]
        return {
            "files": [
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
                for file, mode in zip(files, modes, strict=True)
            ]
        }

    def lfs_batch(self, body: bytes, name: str) -> dict[str, Any]:
        self.repository(name)
        objects = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if not (self.objects / asked["oid"]).exists():
                actions = {key: {"href": f"{self.endpoint}/lfs/{key}/{asked['oid']}"} for key in ("upload", "verify")}
                answer["actions"] = actions
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, body: bytes, oid: str) -> dict[str, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(HTTPStatus.BAD_REQUEST, "BadDigest", f"the content is not {oid}")
        self.store(body)
        return {}

    def lfs_verify(self, body: bytes, oid: str) -> dict[str, Any]:
        path = self.objects / oid
        if not path.exists() or path.stat().st_size != json.loads(body)["size"]:
            raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", f"{oid} was not uploaded whole")
        return {}

    def commit(self, body: bytes, name: str, revision: str) -> dict[str, Any]:
        repository = self.repository(name)
        files = dict(repository.at(revision)[1])
        title = ""
        for line in body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                title = value["summary"]
            elif kind == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = (self.store(content), len(content))
            elif kind == "lfsFile":
                self.lfs_verify(json.dumps({"size": value["size"]}).encode(), value["oid"])
                files[value["path"]] = (value["oid"], value["size"])
            elif kind == "deletedFile":
                del files[value["path"]]
            else:
                raise HubError(HTTPStatus.BAD_REQUEST, "BadRequest", f"unknown operation {kind}")
        sha = repository.commit(title, files)
        return {
            "success": True,
            "commitOid": sha,
            "commitUrl": f"{self.endpoint}/{name}/commit/{sha}",
            "hookOutput": "",
        }

    def info(self, body: bytes, name: str, revision: str | None = None) -> dict[str, Any]:
        repository = self.repository(name)
        sha, files = repository.at(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(files)]
        return {
            "id": name,
            "modelId": name,
            "sha": sha,
            "private": repository.private,
            "tags": [],
            "siblings": siblings,
        }

    def tree(self, body: bytes, name: str, revision: str, folder: str | None = None) -> list[dict[str, Any]]:
        _, files = self.repository(name).at(revision)
        inside = {path: entry for path, entry in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", f"no {folder} in {name}")
        return [
            {"type": "file", "path": path, "size": size, "oid": digest}
            for path, (digest, size) in sorted(inside.items())
        ]


def card_errors(card: str) -> list[str]:
    """What the Hub refuses in a model card's metadata, as far as a model of this kind can get it wrong."""
    block = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    try:
        metadata = yaml.safe_load(block.group(1)) if block else {}
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    errors = []
    if not re.fullmatch(r"[a-z0-9.-]+", str(metadata.get("license", "mit"))):
        errors.append('"license" must be an identifier')
    if metadata.get("pipeline_tag", PIPELINE_TAGS[0]) not in PIPELINE_TAGS:
        errors.append(f'"pipeline_tag" must be one of {PIPELINE_TAGS}')
    tags = metadata.get("tags", [])
    if not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        errors.append('"tags" must be a list of texts')
    return errors


NAME, REVISION = r"([\w.-]+/[\w.-]+)", r"([^/]+)"
ROUTES: list[tuple[str, str, Callable, bool]] = [  # method, path, route, whether it needs the token
    ("GET", r"/api/whoami-v2", HubServer.who_am_i, True),
    ("POST", r"/api/validate-yaml", HubServer.validate_card, False),
    ("POST", r"/api/repos/create", HubServer.create, True),
    ("POST", rf"/api/models/{NAME}/preupload/{REVISION}", HubServer.preupload, True),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", HubServer.lfs_batch, True),
    ("PUT", r"/lfs/upload/(\w+)", HubServer.lfs_upload, False),  # a signed address on the real Hub
    ("POST", r"/lfs/verify/(\w+)", HubServer.lfs_verify, True),
    ("POST", rf"/api/models/{NAME}/commit/{REVISION}", HubServer.commit, True),
    ("GET", rf"/api/models/{NAME}", HubServer.info, False),
    ("GET", rf"/api/models/{NAME}/revision/{REVISION}", HubServer.info, False),
    ("GET", rf"/api/models/{NAME}/tree/{REVISION}(?:/(.+))?", HubServer.tree, False),
]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Nothing on the console; `hub.requests` has them."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self._body()
        try:
            if match := re.fullmatch(rf"/{NAME}/resolve/{REVISION}/(.+)", path):
                self._resolve(*match.groups())
            elif match := re.fullmatch(r"/lfs/(\w{64})", path):
                self._file(match.group(1), {})
            else:
                self._json(HTTPStatus.OK, self._call(path, body))
        except HubError as error:
            self._json(error.status, error.body, {"X-Error-Code": error.code, "X-Error-Message": str(error)})

    do_HEAD = do_POST = do_PUT = do_GET

    def _call(self, path: str, body: bytes) -> Any:
        for method, pattern, route, needs_token in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                if needs_token and self.headers.get("authorization") != f"Bearer {self.hub.token}":
                    raise HubError(HTTPStatus.UNAUTHORIZED, "Unauthorized", "this needs the token")
                return route(self.hub, body, *match.groups())
        raise HubError(HTTPStatus.NOT_FOUND, "NotFound", f"no route {self.command} {path}")

    def _resolve(self, name: str, revision: str, path: str) -> None:
        sha, files = self.hub.repository(name).at(revision)
        if path not in files:
            message = f"no {path} in {name}"
            error = {"X-Error-Code": "EntryNotFound", "X-Error-Message": message, "X-Repo-Commit": sha}
            return self._json(HTTPStatus.NOT_FOUND, {"error": message}, error)
        digest, size = files[path]
        headers = {"X-Repo-Commit": sha, "X-Linked-Size": str(size), "X-Linked-Etag": f'"{digest}"'}
        if path.endswith(BINARY_SUFFIXES):
            location = {"Location": f"{self.hub.storage}/lfs/{digest}"}
            return self._json(HTTPStatus.FOUND, {}, headers | location)
        self._file(digest, headers)

    def _file(self, digest: str, headers: dict[str, str]) -> None:
        content = (self.hub.objects / digest).read_bytes()
        status = HTTPStatus.OK
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", "")):
            first, last = int(match.group(1)), int(match.group(2) or len(content) - 1)
            headers = headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            content, status = content[first : last + 1], HTTPStatus.PARTIAL_CONTENT
        self._send(status, content, headers | {"ETag": f'"{digest}"', "Content-Type": "application/octet-stream"})

    def _json(self, status: HTTPStatus, content: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: HTTPStatus, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)
