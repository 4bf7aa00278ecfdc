"""A Hub on the loopback interface: what huggingface_hub needs to publish a model and load it back.

    with HubServer(tmp_path) as hub:  # HF_ENDPOINT=hub.endpoint, HF_TOKEN=hub.token for the client
        ...

It speaks the client's protocol: repos/create, validate-yaml, preupload, LFS batch and upload, commit (NDJSON), model
info, tree, and resolve with redirects to LFS objects. Uploads are checked against the hash that names them, and writing
needs the token.
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
LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".jpg", ".model")  # those of a new repository's .gitattributes
PIPELINE_TAGS = ("image-text-to-text", "image-to-text", "text-generation", "visual-question-answering")

Files = dict[str, tuple[str, int]]  # path: (SHA-256 of the content, size)


class HubError(Exception):
    """An answer other than 200; the client reads `code` from X-Error-Code."""

    def __init__(self, status: HTTPStatus, code: str, message: str, body: dict[str, Any] | None = None):
        super().__init__(message)
        self.status, self.code, self.body = status, code, body or {"error": message}


class Repository:
    def __init__(self, private: bool):
        self.private = private
        self.commits: list[tuple[str, Files]] = []  # hash and files, newest last
        self.commit({})

    @property
    def files(self) -> Files:
        return self.commits[-1][1]

    def commit(self, files: Files) -> str:
        record = json.dumps([len(self.commits), sorted(files.items())])
        self.commits.append((hashlib.sha1(record.encode()).hexdigest(), files))
        return self.commits[-1][0]

    def at(self, revision: str) -> tuple[str, Files]:
        for sha, files in reversed(self.commits):
            if revision in ("main", sha):
                return sha, files
        raise HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"no revision {revision}")


class HubServer:
    """The server's state, and its routes as methods; `requests` records what the client asked."""

    def __init__(self, folder: Path):
        self.objects = folder / "objects"  # by SHA-256
        self.objects.mkdir(parents=True)
        self.repositories: dict[str, Repository] = {}
        self.token = f"hf_{secrets.token_hex(17)}"
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.storage = f"http://localhost:{self._server.server_port}"  # not the host of the Hub

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
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

    # -- routes: arguments are the request's body and what the path matched --------------------------------------------

    def who_am_i(self, body: bytes) -> dict[str, Any]:
        return {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def validate_card(self, body: bytes) -> dict[str, Any]:
        errors = [{"message": message} for message in card_errors(json.loads(body)["content"])]
        if errors:
            raise HubError(HTTPStatus.BAD_REQUEST, "BadRequest", "invalid card", {"errors": errors, "warnings": []})
        return {"errors": [], "warnings": []}

    def create(self, body: bytes) -> dict[str, Any]:
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        url = {"url": f"{self.endpoint}/{name}", "name": name}
        if name in self.repositories:
            raise HubError(HTTPStatus.CONFLICT, "RepoExists", f"{name} exists", url)
        self.repositories[name] = Repository(bool(asked.get("private")))
        return url

    def preupload(self, body: bytes, name: str, revision: str) -> dict[str, Any]:
        self.repository(name).at(revision)
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = ["lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in paths]
        files = zip(paths, modes, strict=True)
        return {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False, "oid": None} for p, mode in files]}

    def lfs_batch(self, body: bytes, name: str) -> dict[str, Any]:
        self.repository(name)
        objects = [{"oid": asked["oid"], "size": asked["size"]} for asked in json.loads(body)["objects"]]
        for missing in (entry for entry in objects if not (self.objects / entry["oid"]).exists()):
            links = {key: {"href": f"{self.endpoint}/lfs/{key}/{missing['oid']}"} for key in ("upload", "verify")}
            missing["actions"] = links
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, body: bytes, oid: str) -> dict[str, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(HTTPStatus.BAD_REQUEST, "BadDigest", f"the content is not {oid}")
        self.store(body)
        return {}

    def lfs_verify(self, body: bytes, oid: str) -> dict[str, Any]:
        path = self.objects / oid
        if not path.exists() or path.stat().st_size != json.loads(body)["size"]:
            raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", f"{oid} was not uploaded completely")
        return {}

    def commit(self, body: bytes, name: str, revision: str) -> dict[str, Any]:
        repository = self.repository(name)
        files = dict(repository.at(revision)[1])
        for operation in map(json.loads, body.splitlines()):
            value = operation["value"]
            if operation["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = (self.store(content), len(content))
            elif operation["key"] == "lfsFile":
                self.lfs_verify(json.dumps({"size": value["size"]}).encode(), value["oid"])
                files[value["path"]] = (value["oid"], value["size"])
            elif operation["key"] != "header":
                raise HubError(HTTPStatus.BAD_REQUEST, "BadRequest", f"unknown operation {operation['key']}")
        sha = repository.commit(files)
        url = f"{self.endpoint}/{name}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""}

    def info(self, body: bytes, name: str) -> dict[str, Any]:
        repository = self.repository(name)
        siblings = [{"rfilename": path} for path in sorted(repository.files)]
        result = {"id": name, "modelId": name, "sha": repository.commits[-1][0], "private": repository.private}
        return result | {"tags": [], "siblings": siblings}

    def tree(self, body: bytes, name: str, revision: str, folder: str | None = None) -> list[dict[str, Any]]:
        files = sorted(self.repository(name).at(revision)[1].items())
        entries = [{"type": "file", "path": p, "size": size, "oid": digest} for p, (digest, size) in files]
        if folder:
            entries = [entry for entry in entries if entry["path"].startswith(f"{folder}/")]
            if not entries:
                raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", f"no {folder} in {name}")
        return entries


def card_errors(card: str) -> list[str]:
    """What the Hub refuses in a model card's metadata, as far as this kind of model uses it."""
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
    ("GET", rf"/api/models/{NAME}/tree/{REVISION}(?:/(.+))?", HubServer.tree, False),
]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """`hub.requests` has them."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
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
        headers = {"X-Repo-Commit": sha}
        if path not in files:
            message = f"no {path} in {name}"
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": message}
            return self._json(HTTPStatus.NOT_FOUND, {"error": message}, headers)
        digest, size = files[path]
        headers |= {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{digest}"'}
        if path.endswith(LFS_SUFFIXES):
            return self._json(HTTPStatus.FOUND, {}, headers | {"Location": f"{self.hub.storage}/lfs/{digest}"})
        return self._file(digest, headers)

    def _file(self, digest: str, headers: dict[str, str]) -> None:
        headers = headers | {"ETag": f'"{digest}"', "Content-Type": "application/octet-stream"}
        self._send(HTTPStatus.OK, (self.hub.objects / digest).read_bytes(), headers)

    def _json(self, status: HTTPStatus, content: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: HTTPStatus, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
