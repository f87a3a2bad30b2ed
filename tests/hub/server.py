"""A Hub on the loopback interface: the HTTP protocol that huggingface_hub speaks, over repositories in memory.

Commits, branches, private and gated repositories, regular and LFS uploads, and downloads with ranges. Faults are
queued by the test: the next requests that match get an error, a delay, or half an answer.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 10_000
"""Files of at least so many bytes, and all safetensors, are LFS objects here; on the real Hub it is 10 MB."""


@dataclass(slots=True)
class Fault:
    """What happens to the next `times` requests with this method and a path that matches.

    Attributes:
        status: answer with this code, and `error` as X-Error-Code and message.
        delay: seconds to wait before going on.
        drop_after: close the connection after so many bytes of the body.
    """

    method: str
    path: str
    status: int | None = None
    error: str | None = None
    delay: float = 0.0
    drop_after: int | None = None
    times: int = 1


@dataclass(slots=True)
class Repo:
    """One repository: commits by hash, branches by name."""

    name: str
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    pull_requests: int = 0

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        """A commit with exactly these files at the tip of a branch."""
        content = [f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in sorted(files.items())]
        sha = hashlib.sha1("\n".join([str(len(self.commits)), message, *content]).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.messages[sha] = message
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch or hash."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Refused(Exception):
    """Ends a request with an error status, as the Hub words it."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass
class Hub:
    """The state of the server, for tests to prepare and to look at.

    Attributes:
        tokens: token -> (user, organisations, role).
        requests: (method, path) of everything that was asked, in order.
        received: bytes of LFS content that arrived, by object id.
        sent: bytes of file content that left, by path.
    """

    tokens: dict[str, tuple[str, list[str], str]] = field(default_factory=dict)
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    received: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    ranges: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    url: str = ""

    def fail(self, method: str, path: str, **how: Any) -> Fault:
        """Queue a fault; `path` is a regular expression that is searched."""
        fault = Fault(method, path, **how)
        self.faults.append(fault)
        return fault

    def fault(self, method: str, path: str) -> Fault | None:
        """Take the first queued fault that matches."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Files of a repository at a revision."""
        repo = self.repos[name]
        sha = repo.resolve(revision)
        assert sha is not None
        return repo.commits[sha]

    def add(self, name: str, files: dict[str, bytes], *, branch: str = "main", **how: Any) -> str:
        """A repository, or one more branch of it, with these files."""
        repo = self.repos.setdefault(name, Repo(name, **how))
        return repo.commit(branch, files, "first")

    def asked(self, method: str, pattern: str) -> list[str]:
        """Paths of the requests so far that match."""
        return [path for verb, path in self.requests if verb == method and re.search(pattern, path)]


class Handler(BaseHTTPRequestHandler):
    """One request. Routes are methods; what they return becomes JSON."""

    protocol_version = "HTTP/1.1"
    hub: Hub
    timeout = 20  # of an idle connection, so that no thread outlives its test for long

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.hub.requests.append((self.command, path))
        self.fault = self.hub.fault(self.command, path)
        if self.fault is not None:
            threading.Event().wait(self.fault.delay)  # not time.sleep, which tests of retries replace
        if self.fault is not None and self.fault.drop_after is not None and self.command in ("PUT", "POST"):
            self.rfile.read(self.fault.drop_after)
            self._hang_up()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            if self.fault is not None and self.fault.status is not None:
                raise Refused(self.fault.status, self.fault.error, self.fault.error or "as the test wants")
            for method, pattern, route in ROUTES:
                match = re.fullmatch(pattern, path)
                if match is not None and self.command in method:
                    answer = route(self, body, *match.groups())
                    if answer is not None:
                        self._json(200, answer)
                    return
            raise Refused(404, None, f"no route for {self.command} {path}")
        except Refused as refused:
            headers = {"X-Error-Message": refused.message}
            if refused.code is not None:
                headers["X-Error-Code"] = refused.code
            self._json(refused.status, {"error": refused.message}, headers)

    def _json(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(2)

    def _who(self) -> tuple[str, list[str], str] | None:
        header = self.headers.get("Authorization", "")
        if header == "":
            return None
        who = self.hub.tokens.get(header.removeprefix("Bearer "))
        if who is None:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        return who

    def _repo(self, name: str, *, write: bool = False) -> Repo:
        """The repository, if the one who asks may see (or change) it; unseen ones are 404, or 401 without token."""
        who = self._who()
        repo = self.hub.repos.get(name)
        member = who is not None and name.partition("/")[0] in (who[0], *who[1])
        if repo is None or (repo.private and not member):
            raise Refused(401 if who is None else 404, "RepoNotFound", "Repository not found")
        if repo.gated and not member and not write and "/resolve/" in self.path:
            raise Refused(403 if who else 401, "GatedRepo", f"Access to model {name} is restricted")
        if write and (not member or (who is not None and who[2] == "read")):
            raise Refused(403, None, "You don't have the rights to write here")
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        sha = repo.resolve(unquote(revision))
        if sha is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def whoami(self, _: bytes) -> Any:
        who = self._who()
        if who is None:
            raise Refused(401, None, "Invalid username or password.")
        user, organisations, role = who
        return {
            "type": "user",
            "name": user,
            "orgs": [{"name": name, "type": "org"} for name in organisations],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
        }

    def create_repo(self, body: bytes) -> Any:
        asked, who = json.loads(body), self._who()
        if who is None:
            raise Refused(401, None, "Invalid username or password.")
        owner = asked.get("organization") or who[0]
        if owner not in (who[0], *who[1]) or who[2] == "read":
            raise Refused(403, None, f"You don't have the rights to create a model under the namespace {owner!r}")
        name = f"{owner}/{asked['name']}"
        with self.hub.lock:
            if name in self.hub.repos:
                self._json(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
                return None
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return {"url": f"{self.hub.url}/{name}", "name": name, "id": name}

    def create_branch(self, body: bytes, name: str, branch: str) -> Any:
        repo = self._repo(name, write=True)
        if branch in repo.branches:
            raise Refused(409, None, f"Reference already exists: refs/heads/{branch}")
        start = json.loads(body or b"{}").get("startingPoint", "main")
        repo.branches[branch] = self._commit(repo, start)
        return {}

    def validate_yaml(self, body: bytes) -> Any:
        content = json.loads(body)["content"]
        if not content.startswith("---\n"):
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        return {"errors": [], "warnings": []}

    def preupload(self, body: bytes, name: str, revision: str) -> Any:
        repo = self._repo(name, write=True)
        there = repo.commits[self._commit(repo, revision)]
        files = []
        for file in json.loads(body)["files"]:
            large = file["size"] >= LARGE or file["path"].endswith(".safetensors")
            held = there.get(file["path"])
            oid = None if held is None else object_id(file["path"], held)
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def lfs_batch(self, body: bytes, name: str) -> Any:
        self._repo(name, write=True)
        objects = []
        for entry in json.loads(body)["objects"]:
            answer: dict[str, Any] = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/lfs/{entry['oid']}"
                verify = {"href": f"{self.hub.url}/lfs/{entry['oid']}/verify"}
                answer["actions"] = {"upload": {"href": href, "header": {}}, "verify": verify}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, body: bytes, oid: str) -> Any:
        self.hub.received[oid] = self.hub.received.get(oid, 0) + len(body)
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, None, "the content does not have this hash")
        self.hub.objects[oid] = body
        return {}

    def lfs_verify(self, body: bytes, oid: str) -> Any:
        held = self.hub.objects.get(oid)
        if held is None or len(held) != json.loads(body)["size"]:
            raise Refused(404, None, "object not found")
        return {}

    def commit(self, body: bytes, name: str, revision: str) -> Any:
        repo = self._repo(name, write=True)
        with self.hub.lock:
            files = dict(repo.commits[self._commit(repo, revision)])
            message = ""
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    message = value["summary"]
                elif entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        raise Refused(400, None, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                    files[value["path"]] = self.hub.objects[value["oid"]]
                elif entry["key"] == "deletedFile":
                    files.pop(value["path"])
            branch = revision
            if "create_pr" in self.query:
                repo.pull_requests += 1
                branch = f"refs/pr/{repo.pull_requests}"
            sha = repo.commit(branch, files, message)
        url = f"{self.hub.url}/{name}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}"}
        return answer | {"pullRequestUrl": f"{url}/discussions/{repo.pull_requests}"}

    def model_info(self, _: bytes, name: str, revision: str | None) -> Any:
        repo = self._repo(name)
        sha = self._commit(repo, revision or "main")
        files = repo.commits[sha]
        siblings = [{"rfilename": path, "size": len(files[path])} for path in sorted(files)]
        answer = {"id": name, "modelId": name, "sha": sha, "private": repo.private, "gated": repo.gated}
        return answer | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0}

    def tree(self, _: bytes, name: str, revision: str, inside: str | None) -> Any:
        repo = self._repo(name)
        files = repo.commits[self._commit(repo, revision)]
        prefix = "" if inside is None else f"{inside}/"
        below = {path: data for path, data in files.items() if path.startswith(prefix)}
        if inside is not None and not below:
            raise Refused(404, "EntryNotFound", f"{inside} does not exist on {revision!r}")
        entries: dict[str, Any] = {}
        for path, data in sorted(below.items()):
            folder, slash, _rest = path.removeprefix(prefix).partition("/")
            if slash and not {"true", "True", "1"} & set(self.query.get("recursive", [])):
                where = f"{prefix}{folder}"
                entries[where] = {"type": "directory", "path": where, "oid": "0" * 40, "size": 0}
            else:
                entries[path] = entry_of(path, data)
        return list(entries.values())

    def resolve(self, _: bytes, name: str, revision: str, path: str) -> Any:
        repo = self._repo(name)
        sha = self._commit(repo, revision)
        data = repo.commits[sha].get(path)
        if data is None:
            self._json(
                404,
                {"error": "Entry not found"},
                {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": sha},
            )
            return None
        headers = {"X-Repo-Commit": sha, "ETag": f'"{object_id(path, data)}"', "Accept-Ranges": "bytes"}
        if is_large(path, data):
            headers |= {"X-Linked-Etag": f'"{object_id(path, data)}"', "X-Linked-Size": str(len(data))}
        self._content(path, data, headers)
        return None

    def _content(self, path: str, data: bytes, headers: dict[str, str]) -> None:
        first, status = 0, 200
        asked = self.headers.get("Range")
        if asked is not None and self.command == "GET":
            self.hub.ranges.append(asked)
            start, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end) if end else len(data) - 1, len(data) - 1)
            if first >= len(data):
                raise Refused(416, None, "Requested Range Not Satisfiable")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = None if self.fault is None else self.fault.drop_after
        data = data if cut is None else data[:cut]
        self.hub.sent[path] = self.hub.sent.get(path, 0) + len(data)
        self.wfile.write(data)
        if cut is not None:
            self._hang_up()


REPO = r"([\w.-]+/[\w.-]+)"
Route = Callable[..., Any]
ROUTES: list[tuple[tuple[str, ...], str, Route]] = [
    (("GET",), r"/api/whoami-v2", Handler.whoami),
    (("POST",), r"/api/repos/create", Handler.create_repo),
    (("POST",), r"/api/validate-yaml", Handler.validate_yaml),
    (("POST",), rf"/api/models/{REPO}/branch/(.+)", Handler.create_branch),
    (("POST",), rf"/api/models/{REPO}/preupload/(.+)", Handler.preupload),
    (("POST",), rf"/api/models/{REPO}/commit/(.+)", Handler.commit),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), r"/lfs/([0-9a-f]{64})", Handler.lfs_put),
    (("POST",), r"/lfs/([0-9a-f]{64})/verify", Handler.lfs_verify),
    (("GET",), rf"/api/models/{REPO}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    (("GET",), rf"/api/models/{REPO}(?:/revision/(.+))?", Handler.model_info),
    (("GET", "HEAD"), rf"/{REPO}/resolve/([^/]+|refs/pr/\d+)/(.+)", Handler.resolve),
]


def is_large(path: str, data: bytes) -> bool:
    """Whether a file is an LFS object."""
    return len(data) >= LARGE or path.endswith(".safetensors")


def object_id(path: str, data: bytes) -> str:
    """SHA-256 of an LFS object, the git hash of another file."""
    if is_large(path, data):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry_of(path: str, data: bytes) -> dict[str, Any]:
    """One file of a tree listing."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": object_id(path, data)}
    if is_large(path, data):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a Hub on a free port of 127.0.0.1 until the block ends."""
    hub = Hub(tokens={"hf_owner": ("me", ["team"], "write"), "hf_reader": ("me", [], "read")})
    hub.tokens["hf_other"] = ("stranger", [], "write")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
