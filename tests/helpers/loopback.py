"""A Hugging Face Hub on the loopback interface, in memory, with scripted failures.

It answers the calls by which huggingface_hub 2.4, diffusers and datasets push and pull repositories, with regular
commits and LFS. It has no Xet storage, whose protocol is binary, so clients get HF_HUB_DISABLE_XET=1. As on the real
Hub:

- A new repository starts with a commit of .gitattributes.
- Another host (`localhost` instead of `127.0.0.1`), which must not see the token, stores and serves LFS files.
- A commit that changes nothing is still a commit.

    with LoopbackHub() as hub:
        hub.fail("POST .*/commit/", times=2, status=503)
        subprocess.run([sys.executable, "push.py"], env=hub.environment(tmp_path / "home"), check=True)
        assert hub.repository("tester/model").files["config.json"] == b"{}"
        assert not hub.unhandled
"""

import base64
import contextlib
import hashlib
import itertools
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKEN = "hf_loopback_tester"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt", ".parquet", ".arrow", ".npz", ".zip")
PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}
INVALID_TOKEN = "Invalid credentials in Authorization header"
DATE = "2026-01-01T00:00:00.000Z"
LICENCES = ["apache-2.0", "mit", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "other"]  # some of the Hub's licences


@dataclass(frozen=True)
class User:
    """The owner of a token; without `write` the token can only read."""

    name: str
    write: bool = True
    organizations: tuple[str, ...] = ()


@dataclass
class Request:
    """A received request. `status` is the status of the answer, or None if the connection was cut."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]  # names in lower case
    body: bytes
    status: int | None = None

    @property
    def line(self) -> str:
        """Method and path, against which the patterns of failures are matched."""
        return f"{self.method} {unquote(self.path)}"

    def json(self) -> dict:
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    body: object = b""  # sent as JSON unless it is bytes
    status: int | None = 200  # None: the connection is cut without an answer
    headers: dict[str, str] = field(default_factory=dict)
    reset: bool = False  # cut it by a reset, not by closing it


class Refusal(Exception):
    """An error response, with the headers from which huggingface_hub picks its exception."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] = {}):
        headers = {**headers, "X-Error-Message": ascii(message)[1:-1]} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer({"error": message}, status, headers)


@dataclass
class Failure:
    """A scripted failure; `hits` counts the requests that it has hit."""

    pattern: str
    times: float
    answer: Answer
    processed: bool
    hits: int = 0


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
        return text.format(self.sha256, len(self.content)).encode()

    @property
    def blob_id(self) -> str:
        """The git object id."""
        data = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass
class Commit:
    oid: str
    message: str
    description: str
    tree: dict[str, File]
    branch: str

    @property
    def files(self) -> dict[str, bytes]:
        return {path: file.content for path, file in self.tree.items()}


class Repository:
    """The commits of all branches in order of arrival, and the branches and tags that point to them."""

    def __init__(self, kind: str, id: str, private: bool):
        self.kind, self.id, self.private = kind, id, private
        self.commits: list[Commit] = []
        self._made = itertools.count()
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.commit("main", "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n")})

    def commit(self, branch: str, message: str, tree: dict[str, File], description: str = "") -> Commit:
        oid = hashlib.sha1(f"{self.kind} {self.id} {next(self._made)} {message}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, description, tree, branch))
        self.branches[branch] = oid
        return self.commits[-1]

    def at(self, revision: str) -> Commit:
        """The commit of a branch, tag or commit id."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        oid = self.branches.get(name) or self.tags.get(name) or revision
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    @property
    def files(self) -> dict[str, bytes]:
        """Contents by path on main."""
        return self.at("main").files

    @property
    def messages(self) -> list[str]:
        """Messages of the commits on main, without the initial commit."""
        return [commit.message for commit in self.commits[1:] if commit.branch == "main"]


class LoopbackHub:
    """The Hub. It serves between `start` and `stop`, or as a context manager.

    Attributes:
        url: address of the server.
        users: users by token.
        repositories: repositories by (kind, id); `repository(id, kind)` looks one up.
        storage: LFS contents by SHA-256.
        log: every request, in order.
        unhandled: the requests that it could not answer.
        lfs_suffixes: endings of the files that clients upload by LFS: () for no file, ("",) for all non-empty files.
    """

    def __init__(self):
        self._lock = threading.RLock()
        self._server: ThreadingHTTPServer | None = None
        self._connections: set[socket.socket] = set()
        self.is_up = False
        self.port = 0
        self.clear()

    def clear(self) -> None:
        """Reset to an unused Hub on the same port."""
        self.users = {TOKEN: User("tester", organizations=("lab",))}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.log: list[Request] = []
        self.unhandled: list[str] = []
        self.lfs_suffixes: tuple[str, ...] = LFS_SUFFIXES
        self._failures: list[Failure] = []
        self._callbacks: list[Callable[[Request], None]] = []
        if self._server:
            self.up()

    # serving

    def start(self) -> "LoopbackHub":
        self._bind()
        self.url, self.storage_url = (f"http://{host}:{self.port}" for host in ("127.0.0.1", "localhost"))
        self.up()
        return self

    def stop(self) -> None:
        self.down()
        self._server.server_close()

    __enter__ = start

    def __exit__(self, *error) -> None:
        self.stop()

    def up(self) -> None:
        """Become reachable."""
        if self.is_up:
            return
        self._server.server_activate()
        self.is_up = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Become unreachable until `up`: open connections end, new ones are refused, and the port is kept."""
        if not self.is_up:
            return
        self.is_up = False
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):  # the connection may have ended
                connection.shutdown(socket.SHUT_RDWR)
        self._bind()

    def _bind(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler, bind_and_activate=False)
        self._server.hub = self
        self._server.server_bind()
        self.port = self._server.server_port

    # for tests

    def environment(self, home: Path, token: str | None = TOKEN, xet: bool = False, **more: str) -> dict[str, str]:
        """The environment for a client in another process: caches under `home`, and none of the user's Hub settings.

        With `xet` the client uses hf_xet, as most users' clients do, because it comes with huggingface_hub. Then set
        `lfs_suffixes` to (), because this Hub has no Xet storage.
        """
        ours = re.compile("HF_|HUGGING|.*_PROXY$", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not ours.match(name)}
        names = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
        names |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "0" if xet else "1"}
        return kept | names | ({"HF_TOKEN": token} if token else {}) | more

    def repository(self, id: str, kind: str = "model") -> Repository:
        return self.repositories[kind, id]

    def calls(self, pattern: str = "") -> list[Request]:
        """The logged requests whose "METHOD /path" matches `pattern`."""
        return [request for request in self.log if re.search(pattern, request.line)]

    def fail(
        self,
        pattern: str,
        times: float = 1,
        status: int = 503,
        headers: dict[str, str] | None = None,
        reset: bool = False,
        close: bool = False,
        processed: bool = False,
    ) -> Failure:
        """Let the next `times` requests whose "METHOD /path" matches `pattern` fail.

        They are answered with `status`, `headers` and an HTML page, as by a gateway. With `reset` or `close` the
        connection is cut without an answer. With `processed` the request takes effect first, and only its answer is
        lost.
        """
        headers = {"Content-Type": "text/html", **(headers or {})}
        answer = Answer(b"<html>scripted</html>", None if reset or close else status, headers, reset)
        self._failures.append(Failure(pattern, times, answer, processed))
        return self._failures[-1]

    def on_request(self, callback: Callable[[Request], None]) -> None:
        """Call `callback` with every request before it takes effect. It runs in the serving thread and can block."""
        self._callbacks.append(callback)

    # answering

    def answer(self, request: Request) -> Answer:
        """Log a request and return the answer to it."""
        self.log.append(request)
        for callback in list(self._callbacks):
            callback(request)
        with self._lock:
            failures = [f for f in self._failures if f.hits < f.times and re.search(f.pattern, request.line)][:1]
            if not self.is_up:
                answer = Answer(status=None, reset=True)
            elif failures and not failures[0].processed:
                answer = failures[0].answer
            else:
                try:
                    answer = self._process(request)
                except Refusal as refusal:
                    answer = refusal.answer
                except Exception as error:  # a fault of this file, or an unexpected request
                    self.unhandled.append(f"{request.line}: {error!r}")
                    answer = Answer(status=501)
                answer = failures[0].answer if failures else answer
            for failure in failures:
                failure.hits += 1
            request.status = answer.status
            return answer

    def _process(self, request: Request) -> Answer:
        for method, pattern, function, write in ROUTES:
            match = pattern.fullmatch(request.path)
            if match and method == request.method.replace("HEAD", "GET") and "create_pr" not in request.query:
                names = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                user = None if request.path.startswith("/storage/") else self._user(request)
                if write and user is None:
                    raise Refusal(401, "Invalid username or password.")
                if "id" in names:
                    kind = names.pop("kind", "models").removesuffix("s")
                    repo = self._repository(kind, names.pop("id"), user, write)
                    reply = function(self, request, repo, **names)
                else:
                    reply = function(self, request, user, **names)
                return reply if isinstance(reply, Answer) else Answer(reply)
        self.unhandled.append(f"{request.line} {request.query or ''}".strip())
        raise Refusal(501, "The loopback Hub does not know this request.")

    def _user(self, request: Request) -> User | None:
        header = request.headers.get("authorization")
        if header is None:
            return None
        if header.removeprefix("Bearer ") not in self.users:
            raise Refusal(401, INVALID_TOKEN)
        return self.users[header.removeprefix("Bearer ")]

    def _repository(self, kind: str, id: str, user: User | None, write: bool) -> Repository:
        repo = self.repositories.get((kind, id))
        if repo is None or (repo.private and not may_see(user, repo)):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not may_write(user, id.split("/")[0]):
            raise Refusal(403, "Forbidden: you must use a write token with access to this repository")
        return repo


def may_see(user: User | None, repo: Repository) -> bool:
    return user is not None and repo.id.split("/")[0] in (user.name, *user.organizations)


def may_write(user: User, namespace: str) -> bool:
    return user.write and namespace in (user.name, *user.organizations)


# the routes

ROUTES: list[tuple[str, re.Pattern, Callable, bool]] = []
API = r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"
REPO = r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)"
REVISION = r"/(?P<revision>[^/]+)"


def route(method: str, pattern: str, write: bool = False) -> Callable:
    """Register a function of (hub, request, repository or user, **names); `write` requires the right to write."""

    def register(function):
        ROUTES.append((method, re.compile(pattern), function, write))
        return function

    return register


@route("GET", "/api/whoami-v2", write=True)
def whoami(hub, request, user):
    token = {"accessToken": {"displayName": "test", "role": "write" if user.write else "read"}}
    return {"type": "user", "name": user.name, "orgs": [{"name": name} for name in user.organizations], "auth": token}


@route("POST", "/api/repos/create", write=True)
def create_repo(hub, request, user):
    spec = request.json()
    kind, namespace = spec.get("type") or "model", spec.get("organization") or user.name
    id = f"{namespace}/{spec['name']}"
    url = f"{hub.url}/{PREFIXES[kind]}{id}"
    if not may_write(user, namespace):
        raise Refusal(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    if (kind, id) in hub.repositories:
        return Answer({"error": f"You already created this {kind} repo: {id}", "url": url}, 409)
    private = spec.get("visibility") == "private" or bool(spec.get("private"))
    hub.repositories[kind, id] = Repository(kind, id, private)
    return {"url": url, "name": id, "id": "1"}


@route("POST", "/api/validate-yaml")
def validate_yaml(hub, request, user):
    match = re.match(r"---\s*\n(.*?)\n?---\s*(\n|$)", request.json()["content"], re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        return Answer({"errors": [{"message": str(error)}], "warnings": [], "error": str(error)}, 400)
    licence = (metadata or {}).get("license", "mit")
    if licence not in LICENCES:
        return Answer({"errors": [{"message": f'"license" must be one of {LICENCES}'}], "warnings": []}, 400)
    empty = {"message": "empty or missing yaml metadata in repo card"}
    return {"errors": [], "warnings": [] if metadata else [empty]}


@route("POST", f"{API}/preupload{REVISION}", write=True)
def preupload(hub, request, repo, revision):
    tree = repo.at(revision).tree
    modes = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["size"] and file["path"].endswith(hub.lfs_suffixes) else "regular",
            "shouldIgnore": False,
            "oid": tree[file["path"]].etag if file["path"] in tree else None,
        }
        for file in request.json()["files"]
    ]
    return {"commitOid": repo.at(revision).oid, "files": modes}


@route("POST", rf"{REPO}\.git/info/lfs/objects/batch", write=True)
def lfs_batch(hub, request, repo):
    verify = f"{hub.url}{request.path.removesuffix('batch')}verify"
    objects = []
    for item in request.json()["objects"]:
        upload = {"href": f"{hub.storage_url}/storage/{item['oid']}"}
        needed = {} if item["oid"] in hub.storage else {"actions": {"upload": upload, "verify": {"href": verify}}}
        objects.append({"oid": item["oid"], "size": item["size"], **needed})
    return {"transfer": "basic", "objects": objects}


@route("POST", rf"{REPO}\.git/info/lfs/objects/verify", write=True)
def lfs_verify(hub, request, repo):
    item = request.json()
    if len(hub.storage.get(item["oid"], b"")) != item["size"]:
        raise Refusal(404, "Object not found or of another size")
    return {}


@route("PUT", "/storage/(?P<oid>[0-9a-f]{64})")
def store(hub, request, user, oid):
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refusal(400, "The content does not have this sha256")
    hub.storage[oid] = request.body
    return b""


@route("GET", "/storage/(?P<oid>[0-9a-f]{64})")
def stored(hub, request, user, oid):
    if oid not in hub.storage:
        raise Refusal(404, "No such object")
    return content(request, hub.storage[oid], {"ETag": f'"{oid}"'})


@route("POST", f"{API}/commit{REVISION}", write=True)
def commit(hub, request, repo, revision):
    if revision not in repo.branches:
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    head, header = repo.at(revision), {}
    tree = dict(head.tree)
    for line in request.body.splitlines():
        key, value = (json.loads(line)[name] for name in ("key", "value"))
        path = value.get("path", "")
        if key == "header":
            header = value
            if value.get("parentCommit", head.oid) != head.oid:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        elif key == "file":
            tree[path] = File(base64.b64decode(value["content"]))
        elif key == "lfsFile" and value["oid"] in hub.storage:
            tree[path] = File(hub.storage[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in tree if name == path or name.startswith(path.rstrip("/") + "/")]
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del tree[name]
        else:
            raise Refusal(400, f"Cannot commit {key} {path}: its content was not uploaded")
    new = repo.commit(revision, header["summary"], tree, header["description"])
    return {"success": True, "commitOid": new.oid, "commitUrl": f"{hub.url}/{repo.id}/commit/{new.oid}"}


@route("POST", f"{API}/(?P<what>branch|tag)/(?P<name>[^/]+)", write=True)
def make_ref(hub, request, repo, what, name):
    spec = request.json()
    if what == "tag":  # the path holds the revision to tag
        target, name = repo.at(name), spec["tag"]
    else:
        target = repo.at(spec.get("startingPoint") or "main")
    refs = repo.branches if what == "branch" else repo.tags
    if name in refs:
        raise Refusal(409, f"The {what} {name} exists already")
    refs[name] = target.oid
    return b""


@route("POST", f"{API}/super-squash{REVISION}", write=True)
def squash(hub, request, repo, revision):
    """Replace the history of the branch by one commit of its files."""
    tree = repo.at(revision).tree
    repo.commits = [commit for commit in repo.commits if commit.branch != revision]
    repo.commit(revision, request.json()["message"], tree)
    return b""


@route("GET", f"{API}/refs")
def list_refs(hub, request, repo):
    def listed(refs, folder):
        return [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": oid} for name, oid in refs.items()]

    return {"branches": listed(repo.branches, "heads"), "tags": listed(repo.tags, "tags"), "converts": []}


@route("GET", f"{API}/commits{REVISION}")
def list_commits(hub, request, repo, revision):
    """The commits up to the revision, newest first. Commits of other branches are not filtered out."""
    commits = repo.commits[repo.commits.index(repo.at(revision)) :: -1]
    return [{"id": c.oid, "title": c.message, "message": c.description, "authors": [], "date": DATE} for c in commits]


@route("GET", f"{API}/auth-check")
@route("GET", f"{API}/auth-check/write", write=True)
def auth_check(hub, request, repo):
    return {}


def described(path: str, file: File) -> dict:
    entry = {"type": "file", "oid": file.blob_id, "size": len(file.content), "path": path}
    lfs = {"oid": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
    return entry | ({"lfs": lfs} if file.lfs else {})


def entries(tree: dict[str, File]) -> dict[str, dict]:
    """The Hub's entries for the files and folders of a tree, by path."""
    found = {path: described(path, file) for path, file in tree.items()}
    for folder in {str(parent) for path in tree for parent in Path(path).parents if parent.name}:
        oid = hashlib.sha1(folder.encode()).hexdigest()
        found[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
    return dict(sorted(found.items()))


@route("GET", f"{API}/tree{REVISION}(?:/(?P<path>.+))?")
def tree(hub, request, repo, revision, path=""):
    found = entries(repo.at(revision).tree)
    if path and found.get(path, {}).get("type") != "directory":
        raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
    below = [entry for name, entry in found.items() if not path or name.startswith(path + "/")]
    if request.query.get("recursive", [""])[0].lower() in ("true", "1"):
        return below
    return [entry for entry in below if str(Path(entry["path"]).parent) == (path or ".")]


@route("POST", f"{API}/paths-info{REVISION}")
def paths_info(hub, request, repo, revision):
    found = entries(repo.at(revision).tree)
    return [found[path] for path in parse_qs(request.body.decode()).get("paths", []) if path in found]


@route("GET", f"{API}(?:/revision{REVISION})?")
def info(hub, request, repo, revision="main"):
    commit = repo.at(revision)
    siblings = [{"rfilename": path} for path in commit.tree]
    names = {"id": repo.id, "author": repo.id.split("/")[0], "sha": commit.oid, "private": repo.private}
    return names | {"gated": False, "disabled": False, "tags": [], "siblings": siblings, "lastModified": DATE}


@route("GET", f"{REPO}/resolve{REVISION}/(?P<path>.+)")
def resolve(hub, request, repo, revision, path):
    commit = repo.at(revision)
    if path not in commit.tree:
        raise Refusal(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.oid})
    file = commit.tree[path]
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.blob_id}"'}
    if not file.lfs:
        return content(request, file.content, headers)
    headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
    return Answer(b"", 302, headers | {"Location": f"{hub.storage_url}/storage/{file.sha256}"})


def content(request: Request, data: bytes, headers: dict[str, str]) -> Answer:
    """An answer with `data`, or with the requested range of it."""
    headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not match:
        return Answer(data, 200, headers)
    first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
    if first > last:
        return Answer(b"", 416, headers | {"Content-Range": f"bytes */{len(data)}"})
    return Answer(data[first : last + 1], 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})


# the wire


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.server.hub._connections.add(self.connection)

    def finish(self):
        self.server.hub._connections.discard(self.connection)
        super().finish()

    def handle(self):
        with contextlib.suppress(OSError):  # the client has gone, or the Hub is down
            super().handle()

    def log_message(self, *words):
        pass

    def chunks(self) -> Iterator[bytes]:
        """The request's body, in pieces."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def serve(self):
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, url.path, parse_qs(url.query), headers, b"".join(self.chunks()))
        answer = self.server.hub.answer(request)
        if answer.status is None:
            if answer.reset:  # closing then gives the client an error instead of an end of file
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.rfile.close()  # otherwise it keeps the socket open
                self.connection.close()
            self.close_connection = True
            return
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve


def pushed(hub: LoopbackHub, repo: str = "tester/model") -> dict[str, bytes]:
    """Contents by path on the repository's main branch, without the Hub's own .gitattributes."""
    return {name: content for name, content in hub.repository(repo).files.items() if name != ".gitattributes"}
