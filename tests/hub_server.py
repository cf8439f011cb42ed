"""A Hub on loopback that speaks the protocol of the real one to the real client, and fails where a test says so.

    with HubServer() as hub:
        hub.tokens["a token"] = "write"
        hub.fail("commit", status=503)
        ... HF_ENDPOINT=hub.url, HF_HUB_OFFLINE=0: both are read when huggingface_hub is imported ...
        hub.repos["user/model"].files["config.json"]

The user is called `user`. Everything is kept in memory.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER = "user"
ROUTES = {
    "create": ("POST", r"/api/repos/create"),
    "whoami": ("GET", r"/api/whoami-v2"),
    "validate-yaml": ("POST", r"/api/validate-yaml"),
    "auth-check": ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/auth-check/write"),
    "branch": ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)"),
    "preupload": ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)"),
    "commit": ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)"),
    "tree": ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?"),
    "info": ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?"),
    "lfs-batch": ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    "lfs-put": ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})"),
    "lfs-get": ("GET", r"/lfs/(?P<oid>[0-9a-f]{64})"),
    "lfs-verify": ("POST", r"/lfs/verify"),
    "resolve": ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
}


@dataclass
class Repo:
    """A repository: its files as they are now, and what happened to it.

    Attributes:
        files: content by path; of the main branch.
        lfs: the paths among them that were uploaded as large files.
        commits: messages, oldest first.
        branches: names beside main; a commit to one goes to `files` too.
    """

    visibility: str = "public"
    files: dict[str, bytes] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)
    branches: list[str] = field(default_factory=lambda: ["main"])

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((self.commits, sorted(self.files))).encode()).hexdigest()


@dataclass
class Fault:
    """What a route does instead of its work: answer `status`, with `body`; `hang`; `drop` the connection."""

    status: int | None = None
    body: bytes = b'{"error": "injected"}'
    hang: bool = False
    drop: bool = False


class HubServer:
    """The server; a context manager.

    Attributes:
        repos: by id.
        tokens: "write" or "read" by token.
        upload_mode: "regular" or "lfs", of all files but README.md.
        requests: what was asked so far, as (route, repository or None).
    """

    def __init__(self, upload_mode: str = "regular"):
        self.repos: dict[str, Repo] = {}
        self.tokens = {"hf_writewritewrite": "write", "hf_readreadread": "read"}
        self.upload_mode = upload_mode
        self.requests: list[tuple[str, str | None]] = []
        self.objects: dict[str, bytes] = {}
        self._faults: dict[str, Fault] = {}
        self._over = threading.Event()
        self._connections: list[socket.socket] = []
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> "HubServer":
        server = _Server(("127.0.0.1", 0), _Handler)
        server.hub = self
        self._server, self.port = server, server.server_address[1]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.die()

    def die(self) -> None:
        """Close every connection and accept no new one."""
        self._over.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, home: str | os.PathLike, token: str | None = "hf_writewritewrite") -> dict[str, str]:
        """For a process that is to know this Hub alone."""
        variables = {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "NO_PROXY": "127.0.0.1,localhost",
        }  # fmt: skip
        return variables | ({} if token is None else {"HF_TOKEN": token})

    def fail(self, route: str, **fault) -> None:
        """From now on `route` (a key of `ROUTES`) fails as a `Fault` says; without one, it works again."""
        assert route in ROUTES
        self._faults[route] = Fault(**fault)

    def asked(self, route: str) -> int:
        """How often."""
        return sum(name == route for name, _ in self.requests)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    hub: HubServer

    def handle_error(self, request, client_address):
        pass  # a client that has gone away


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.server.hub._connections.append(self.connection)

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._serve("GET")

    do_HEAD = do_GET

    def do_POST(self):
        self._serve("POST")

    def do_PUT(self):
        self._serve("PUT")

    # ---- the way in ----

    def _serve(self, method: str) -> None:
        self.hub: HubServer = self.server.hub
        url = urlsplit(self.path)
        self.query, body = parse_qs(url.query), self._read_body()
        matches = {n: re.fullmatch(pattern, url.path) for n, (allowed, pattern) in ROUTES.items() if allowed == method}
        name, found = next(((n, match) for n, match in matches.items() if match), (None, None))
        if found is None:
            return self._json(404, {"error": f"no route for {method} {url.path}"})
        groups = {key: unquote(value) if value else value for key, value in found.groupdict().items()}
        self.hub.requests.append((name, groups.get("repo")))
        if not self._fails(self.hub._faults.get(name, Fault())):
            getattr(self, f"_{name.replace('-', '_')}")(body, **groups)

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _fails(self, fault: Fault) -> bool:
        if fault.hang:
            self.hub._over.wait()
        if fault.hang or fault.drop:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return True
        if fault.status is not None:
            self._answer(fault.status, fault.body, {"Content-Type": "application/json"})
        return fault.status is not None

    def _role(self) -> str | None:
        return self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    # ---- the way out ----

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, status: int, content, **headers: str) -> None:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self._answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"} | headers)

    def _missing(self, code: str) -> None:
        self._json(404, {"error": code}, X_Error_Code=code)

    def _may_write(self, repo: str | None = None) -> bool:
        """Answers for itself where not."""
        role = self._role()
        if role is None:
            self._json(401, {"error": "Invalid username or password."})
        elif role != "write" or (repo is not None and not repo.startswith(f"{USER}/")):
            self._json(403, {"error": "You don't have the rights to write here."})
        elif repo is not None and repo not in self.hub.repos:
            self._missing("RepoNotFound")
        else:
            return True
        return False

    # ---- routes ----

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        if self._role() is None:
            return self._json(401, {"error": "Invalid username or password."})
        if self._role() != "write" or not repo.startswith(f"{USER}/"):
            return self._json(403, {"error": f"You don't have the rights to create a model under {repo}."})
        content = {"url": f"{self.hub.url}/{repo}", "name": repo}
        if repo in self.hub.repos:
            return self._json(409, content | {"error": "You already created this model repo"})
        # earlier clients say whether it is private
        self.hub.repos[repo] = Repo(asked.get("visibility") or ("private" if asked.get("private") else "public"))
        self._json(200, content)

    def _whoami(self, body: bytes) -> None:
        role = self._role()
        content = {"name": USER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": role}}}
        self._json(*((401, {"error": "Invalid username or password."}) if role is None else (200, content)))

    def _auth_check(self, body: bytes, repo: str) -> None:
        if self._may_write(repo):
            self._json(200, {})

    def _validate_yaml(self, body: bytes) -> None:
        self._json(200, {"errors": [], "warnings": []})

    def _branch(self, body: bytes, repo: str, revision: str) -> None:
        if self._may_write(repo):
            exists = revision in self.hub.repos[repo].branches
            if not exists:
                self.hub.repos[repo].branches.append(revision)
            self._json(409 if exists else 200, {"error": "exists"} if exists else {})

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        if not self._may_write(repo):
            return
        files = []
        for file in json.loads(body)["files"]:
            content = self.hub.repos[repo].files.get(file["path"])
            mode = "regular" if file["path"] == "README.md" else self.hub.upload_mode
            oid = None if content is None else _oid(content, file["path"] in self.hub.repos[repo].lfs)
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json(200, {"files": files})

    def _lfs_batch(self, body: bytes, repo: str) -> None:
        if not self._may_write(repo):
            return
        objects = []
        for asked in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"},
                "verify": {"href": f"{self.hub.url}/lfs/verify"},
            }
            objects.append(asked | ({} if asked["oid"] in self.hub.objects else {"actions": actions}))
        self._json(200, {"transfer": "basic", "objects": objects})

    def _lfs_put(self, body: bytes, oid: str) -> None:
        good = hashlib.sha256(body).hexdigest() == oid
        if good:
            self.hub.objects[oid] = body
        self._answer(200 if good else 400)

    def _lfs_verify(self, body: bytes) -> None:
        asked = json.loads(body)
        good = len(self.hub.objects.get(asked["oid"], b"")) == asked["size"]
        self._json(200 if good else 404, {})

    def _lfs_get(self, body: bytes, oid: str) -> None:
        self._answer(200, self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        if not self._may_write(repo):
            return
        store = self.hub.repos[repo]
        if revision not in store.branches:
            return self._missing("RevisionNotFound")
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                store.commits.append(value["summary"])
            elif entry["key"] == "file":
                store.files[value["path"]] = base64.b64decode(value["content"])
                store.lfs.discard(value["path"])
            elif entry["key"] == "lfsFile":
                store.files[value["path"]] = self.hub.objects[value["oid"]]
                store.lfs.add(value["path"])
            elif entry["key"] == "deletedFile":
                del store.files[value["path"]]
        url = f"{self.hub.url}/{repo}/commit/{store.sha}"
        self._json(200, {"success": True, "commitOid": store.sha, "commitUrl": url})

    def _info(self, body: bytes, repo: str, revision: str | None) -> None:
        if repo not in self.hub.repos:
            return self._missing("RepoNotFound")
        store = self.hub.repos[repo]
        if revision not in (None, store.sha, *store.branches):
            return self._missing("RevisionNotFound")
        files = [{"rfilename": path} for path in sorted(store.files)]
        head = re.match(rb"---\n(.*?)\n---", store.files.get("README.md", b""), re.DOTALL)
        content = {"id": repo, "sha": store.sha, "private": False, "tags": [], "siblings": files}
        self._json(200, content | ({"cardData": yaml.safe_load(head[1])} if head else {}))

    def _tree(self, body: bytes, repo: str, revision: str, path: str | None) -> None:
        if repo not in self.hub.repos:
            return self._missing("RepoNotFound")
        start = f"{path}/" if path else ""
        found = {name: data for name, data in self.hub.repos[repo].files.items() if name.startswith(start)}
        if path and not found:
            return self._missing("EntryNotFound")
        files = [{"type": "file", "path": name, "size": len(d), "oid": _oid(d, False)} for name, d in found.items()]
        self._json(200, files)

    def _resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        if repo not in self.hub.repos:
            return self._missing("RepoNotFound")
        store = self.hub.repos[repo]
        if revision not in (store.sha, *store.branches):
            return self._missing("RevisionNotFound")
        if path not in store.files:
            return self._json(404, {"error": "EntryNotFound"}, X_Error_Code="EntryNotFound", X_Repo_Commit=store.sha)
        content, is_lfs = store.files[path], path in store.lfs
        headers = {"X-Repo-Commit": store.sha, "ETag": f'"{_oid(content, is_lfs)}"'}
        if not is_lfs:
            return self._answer(200, content, headers | {"Content-Type": "application/octet-stream"})
        oid = _oid(content, True)
        # another host, as the real one: the client follows redirects on the same one
        headers |= {"Location": f"http://localhost:{self.hub.port}/lfs/{oid}", "X-Linked-ETag": f'"{oid}"'}
        self._answer(302, b"", headers | {"X-Linked-Size": str(len(content))})


def _oid(content: bytes, is_lfs: bool) -> str:
    if is_lfs:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
