"""A small Hugging Face Hub on 127.0.0.1, so that tests push and pull through the real client without the network.

Where it fits: tests of pushing, by `hub.py` and by the trainer. Why: mocking the client would test the mock; these are
the requests that huggingface_hub 1.33 to 2.4 really makes for model repositories. Gotchas: the client reads
`HF_ENDPOINT` when it is imported, hence `run_with_hub`, which runs a script in a fresh process; one branch (`main`), no
Xet, no other repository types. Bytes of an LFS upload are believed only when their sha256 is the announced one.

    with HubServer(token="hf_test") as server:
        result = run_with_hub("from huggingface_hub import HfApi; HfApi().create_repo('user/repo')", server)
        assert result.returncode == 0, result.stderr
        server.files["user/repo"]  # {path: bytes}
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from base64 import b64decode
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


@dataclass
class Repo:
    """One model repository: its files at the tip of `main`, and the messages of its commits.

    Of a gated one nobody has been given the files.
    """

    private: bool = False
    gated: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return sha1(f"{len(self.commits)}{sorted(self.files)}".encode()).hexdigest()

    def oid(self, path: str) -> str:
        """What the Hub calls a file's content: sha256 under LFS, else git's blob id. It is also the ETag."""
        data = self.files[path]
        return sha256(data).hexdigest() if path in self.lfs else sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer:
    """A Hub with one user, for `with`. Everything it holds is in memory and may be read by the test at any time.

    Args:
        token: the only token it accepts.
        user: whose token that is; other namespaces cannot be written to.
        lfs: take `*.safetensors` and `*.png` through LFS, as the real Hub does, instead of inside the commit.
    """

    def __init__(self, token: str = "hf_test", user: str = "user", lfs: bool = False) -> None:
        self.token, self.user, self.lfs = token, user, lfs
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    @property
    def files(self) -> dict[str, dict[str, bytes]]:
        """Repository id to path to bytes."""
        return {name: repo.files for name, repo in self.repos.items()}

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def run_with_hub(script: str, server: HubServer, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python source in a fresh process whose Hub is `server`, logged in with its token and with an empty cache.

    Args:
        script: the source. It may import whatever the caller can.
        server: a running server.
        timeout: seconds until the process is killed.
        env: environment variables that win over all others, such as `HF_TOKEN="hf_wrong"`.

    Returns:
        The finished process with its output as text; `returncode` is the caller's to check.

    Raises:
        subprocess.TimeoutExpired: after `timeout`.
    """
    drop = re.compile(r"(HF_|HUGGING_?FACE|TRANSFORMERS_OFFLINE|.*_proxy$)", re.IGNORECASE)
    inherited = {key: value for key, value in os.environ.items() if not drop.match(key)}
    with tempfile.TemporaryDirectory() as home:
        ours = {
            "HF_ENDPOINT": server.url,
            "HF_TOKEN": server.token,
            "HF_HOME": home,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path),
        }
        return subprocess.run(
            [sys.executable, "-c", script],
            env=inherited | ours | env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )


class _Refusal(Exception):
    """An answer of the Hub that is an error, with the headers by which the client tells errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def _front_matter(text: str) -> Any:
    """The YAML at the top of a README, None without one. Raises `yaml.YAMLError`."""
    found = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    return yaml.safe_load(found[1]) if found else None


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass

    # --- plumbing

    def _serve(self) -> None:
        self.body = self._read_body()  # always, or the next request on this connection reads it
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        try:
            with self.hub.lock:
                for methods, pattern, answer in _ROUTES:
                    if self.command in methods.split() and (found := pattern.fullmatch(unquote(address.path))):
                        self._check_token(**found.groupdict())
                        answer(self, **found.groupdict())
                        return
            raise _Refusal(404, f"The test Hub does not serve {self.command} {address.path}")
        except _Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._json({"error": refusal.message}, refusal.status, **headers)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, answer: object, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(answer).encode(), status, **({"Content-Type": "application/json"} | headers))

    def _check_token(self, **_: str) -> None:
        """A wrong token is refused everywhere, also where none is needed; only the signed LFS address takes any."""
        given = self.headers.get("Authorization")
        self.known = given == f"Bearer {self.hub.token}"
        if given is not None and not self.known:
            raise _Refusal(401, "Invalid credentials in Authorization header")

    def _need_user(self, namespace: str | None = None) -> None:
        if not self.known:
            raise _Refusal(401, "Invalid username or password.")
        if namespace not in (None, self.hub.user):
            raise _Refusal(403, f"You don't have the rights to write under the namespace {namespace!r}")

    def _repo(self, name: str, revision: str | None = None) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.known):
            raise _Refusal(404 if self.known else 401, "Repository not found", "RepoNotFound")
        if revision not in (None, "main", repo.head):
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo

    def _writable(self, name: str, revision: str | None = None) -> Repo:
        self._need_user(name.split("/")[0])
        return self._repo(name, revision)

    # --- routes

    def _whoami(self) -> None:
        self._need_user()
        self._json({"type": "user", "id": "1", "name": self.hub.user, "fullname": self.hub.user, "orgs": []})

    def _create(self) -> None:
        wish = json.loads(self.body)
        namespace = wish.get("organization") or self.hub.user
        self._need_user(namespace)
        if wish.get("type", "model") != "model":
            raise _Refusal(400, f"The test Hub holds models only, got type {wish['type']!r}")
        name = f"{namespace}/{wish['name']}"
        answer = {"id": name, "name": name, "url": f"{self.hub.url}/{name}"}
        if name in self.hub.repos:
            message = "You already created this model repo"
            self._json(answer | {"error": message}, 409, **{"X-Error-Message": message})
            return
        self.hub.repos[name] = Repo(private=bool(wish.get("private")) or wish.get("visibility") == "private")
        self._json(answer)

    def _validate_yaml(self) -> None:
        try:
            valid = isinstance(_front_matter(json.loads(self.body)["content"]), dict | None)
        except yaml.YAMLError:
            valid = False
        errors = [] if valid else [{"message": "The front matter is not a YAML mapping"}]
        self._json({"errors": errors, "warnings": []}, 200 if valid else 400)

    def _preupload(self, name: str, revision: str) -> None:
        repo = self._writable(name, revision)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        answer = [
            {
                "path": path,
                "uploadMode": "lfs" if self.hub.lfs and path.endswith((".safetensors", ".png")) else "regular",
                "shouldIgnore": False,
                "oid": repo.oid(path) if path in repo.files else None,
            }
            for path in paths
        ]
        self._json({"files": answer})

    def _lfs_batch(self, name: str) -> None:
        self._writable(name)
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.blobs:
                wanted["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.url}/{name}.git/info/lfs/verify"},
                }
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str) -> None:
        if sha256(self.body).hexdigest() != oid:
            raise _Refusal(400, "The bytes do not have the announced sha256")
        self.hub.blobs[oid] = self.body
        self._send(b"")

    def _lfs_verify(self, name: str) -> None:
        self._writable(name)
        wanted = json.loads(self.body)
        if len(self.hub.blobs.get(wanted["oid"], b"")) != wanted["size"]:
            raise _Refusal(404, "LFS object not found")
        self._json({})

    def _commit(self, name: str, revision: str) -> None:
        repo = self._writable(name, revision)
        files, lfs, message = dict(repo.files), set(repo.lfs), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            path = value.get("path", "")
            if key == "header":
                message = value["summary"]
                continue
            lfs.discard(path)
            if key == "file":
                files[path] = b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise _Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
                files[path] = self.hub.blobs[value["oid"]]
                lfs.add(path)
            elif key == "deletedFile":
                del files[path]
            elif key == "deletedFolder":
                files = {kept: data for kept, data in files.items() if not kept.startswith(f"{path.rstrip('/')}/")}
            else:
                raise _Refusal(400, f"The test Hub does not know the operation {key!r}")
        repo.files, repo.lfs = files, lfs & files.keys()  # a commit lands whole or not at all
        repo.commits.append(message)
        self._json({"success": True, "commitOid": repo.head, "commitUrl": f"{self.hub.url}/{name}/commit/{repo.head}"})

    def _model_info(self, name: str, revision: str | None = None) -> None:
        repo = self._repo(name, revision)
        card = _front_matter(repo.files.get("README.md", b"").decode()) or {}
        self._json(
            {
                "_id": "1",
                "id": name,
                "modelId": name,
                "sha": repo.head,
                "private": repo.private,
                "tags": card.get("tags", []),
                "pipeline_tag": card.get("pipeline_tag"),
                "library_name": card.get("library_name"),
                "siblings": [{"rfilename": path} for path in sorted(repo.files)],
            }
        )

    def _tree(self, name: str, revision: str, folder: str | None = None) -> None:
        repo = self._repo(name, revision)
        prefix = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries: dict[str, dict[str, object]] = {}
        for path in sorted(repo.files):
            first, *rest = path.removeprefix(prefix).split("/")
            if not path.startswith(prefix):
                continue
            if rest and not deep:
                entries[prefix + first] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": prefix + first}
                continue
            size = len(repo.files[path])
            entries[path] = {"type": "file", "oid": repo.oid(path), "size": size, "path": path}
            if path in repo.lfs:
                entries[path]["lfs"] = {"oid": repo.oid(path), "size": size, "pointerSize": 134}
        if prefix and not entries:
            raise _Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        self._json(list(entries.values()))

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name, revision)
        if repo.gated:
            raise _Refusal(403 if self.known else 401, f"Access to model {name} is restricted", "GatedRepo")
        if path not in repo.files:
            raise _Refusal(404, "Entry not found", "EntryNotFound")
        self._send(
            repo.files[path],
            **{"ETag": f'"{repo.oid(path)}"', "X-Repo-Commit": repo.head, "Content-Type": "application/octet-stream"},
        )


_NAME = r"(?P<name>[^/]+/[^/]+?)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES = [
    (methods, re.compile(pattern), answer)
    for methods, pattern, answer in [
        ("GET", "/api/whoami-v2", _Handler._whoami),
        ("POST", "/api/repos/create", _Handler._create),
        ("POST", "/api/validate-yaml", _Handler._validate_yaml),
        ("POST", f"/api/models/{_NAME}/preupload/{_REVISION}", _Handler._preupload),
        ("POST", f"/{_NAME}[.]git/info/lfs/objects/batch", _Handler._lfs_batch),
        ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler._lfs_put),
        ("POST", f"/{_NAME}[.]git/info/lfs/verify", _Handler._lfs_verify),
        ("POST", f"/api/models/{_NAME}/commit/{_REVISION}", _Handler._commit),
        ("GET", f"/api/models/{_NAME}", _Handler._model_info),
        ("GET", f"/api/models/{_NAME}/revision/{_REVISION}", _Handler._model_info),
        ("GET", f"/api/models/{_NAME}/tree/{_REVISION}(?P<folder>/.*)?", _Handler._tree),
        ("HEAD GET", f"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", _Handler._resolve),
    ]
]
