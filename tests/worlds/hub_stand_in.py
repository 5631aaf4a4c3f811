"""A small hub on loopback for huggingface_hub's client, and a second port for large files."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import unquote

from fault_server import Asked, Client, FaultServer

REPO = "org/name"
CONFIG = b'{"peft_type": "LORA", "r": 4}'
WEIGHTS = bytes(range(256)) * 20
ADAPTER = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}
SIGNATURE = "X-Amz-Signature=5ecre7"
_RANGE = re.compile(r"bytes=([0-9]+)-([0-9]*)")
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
_API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)"
    r"(?:/(?P<what>revision|tree|paths-info)/(?P<revision>[^/?]+))?(?P<rest>/[^?]*)?(?:\?.*)?"
)


Files = Mapping[str, bytes]


@dataclass
class Reply:
    status: int
    fields: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class Repo:
    """A repository, visible with `token` only; if gated, its files need the token `accepted`."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    accepted: str | None = None


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def is_large(name: str) -> bool:
    """Return whether LFS keeps the file, as in .gitattributes of new repositories."""
    return name.endswith((".safetensors", ".bin", ".model"))


@dataclass
class HubStandIn:
    """A hub server; `behave` gets each request first, and may answer it instead."""

    behave: Callable[[Asked], Reply | None] | None = None
    asked: list[Asked] = field(default_factory=list)
    repos: dict[str, Repo] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    """Old names of repositories, and their new ones."""

    def __enter__(self) -> Self:
        with ExitStack() as running:
            servers = [running.enter_context(FaultServer(b"", self._answer)) for _ in range(2)]
            self._running = running.pop_all()
        self.netloc, self.store_netloc = (server.netloc for server in servers)
        self.endpoint = f"http://{self.netloc}"
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def put(
        self, repo: str, files: Files, revision: str = "main", *, private_token: str | None = None
    ) -> str:
        """Commit these files on a branch, or under any ref; return the commit's name."""
        found = self.repos.setdefault(repo, Repo())
        found.token = private_token or found.token
        listing = sorted((name, git_sha1(content)) for name, content in files.items())
        commit = hashlib.sha1(f"{repo} {len(found.commits)} {listing}".encode()).hexdigest()
        found.commits[commit] = dict(files)
        found.refs[revision] = commit
        return commit

    def gate(self, repo: str, accepted: str) -> None:
        """Require this token for the repository's files from now on."""
        self.repos[repo].accepted = accepted

    def asked_for(self, method: str, name: str = "") -> list[Asked]:
        return [each for each in self.asked if each.method == method and name in each.target]

    def _answer(self, asked: Asked, client: Client) -> None:
        self.asked.append(asked)
        reply = self.behave(asked) if self.behave is not None else None
        if reply is None:
            reply = self._stored(asked) if self.is_at_store(asked) else self.answered(asked)
        fields = {"Content-Length": str(len(reply.body)), **reply.fields}
        client.head(f"{reply.status} X", *(f"{name}: {text}" for name, text in fields.items()))
        if asked.method != "HEAD":
            client.send(reply.body)

    def is_at_store(self, asked: Asked) -> bool:
        return asked.fields["host"] == self.store_netloc

    def answered(self, asked: Asked) -> Reply:
        found = _RESOLVE.fullmatch(asked.target.partition("?")[0])
        matched = found or _API.fullmatch(asked.target)
        if matched is None:
            return Reply(404)
        name = matched["repo"]
        if name in self.moved:
            there = asked.target.replace(name, self.moved[name], 1)
            return Reply(307, {"Location": there})
        repo, token = self.repos.get(name), _token(asked)
        if repo is None or repo.token not in {None, token}:
            return _error(401 if token is None else 404, "RepoNotFound", "Repository not found")
        revision = unquote(matched["revision"] or "main")
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[commit]
        if found is None:
            return _api(asked, matched, name, repo, commit)
        if repo.accepted not in {None, token}:
            return _error(403 if token else 401, "GatedRepo", f"Access to {name} is restricted")
        return self._resolved(asked, commit, unquote(found["name"]), files)

    def _resolved(self, asked: Asked, commit: str, name: str, files: Files) -> Reply:
        if name not in files:
            missing = _error(404, "EntryNotFound", "Entry not found")
            missing.fields["X-Repo-Commit"] = commit
            return missing
        content = files[name]
        fields = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not is_large(name):
            return _ranged(asked, content, {**fields, "ETag": f'"{git_sha1(content)}"'})
        digest = sha256(content)
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        place = f"http://{self.store_netloc}/store/{digest}?{SIGNATURE}"
        return Reply(302, {**fields, **linked, "Location": place})

    def _stored(self, asked: Asked) -> Reply:
        """Serve a file by its digest for a signed URL; an object store does not check tokens."""
        path, _, query = asked.target.partition("?")
        if query != SIGNATURE or "authorization" in asked.fields:
            return Reply(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
        commits = (files for repo in self.repos.values() for files in repo.commits.values())
        contents = (content for files in commits for content in files.values())
        found = next((each for each in contents if path == f"/store/{sha256(each)}"), None)
        if found is None:
            return Reply(404)
        return _ranged(asked, found, {"ETag": f'"{sha256(found)[:32]}"', "Accept-Ranges": "bytes"})


def _token(asked: Asked) -> str | None:
    said = asked.fields.get("authorization")
    return None if said is None else said.removeprefix("Bearer ")


def _error(status: int, code: str, message: str) -> Reply:
    body = json.dumps({"error": message}).encode()
    return Reply(status, {"X-Error-Code": code, "X-Error-Message": message}, body)


def _ranged(asked: Asked, content: bytes, fields: dict[str, str]) -> Reply:
    wanted = _RANGE.fullmatch(asked.fields.get("range", ""))
    if wanted is None:
        return Reply(200, fields, content)
    start, size = int(wanted[1]), len(content)
    stop = min(size, int(wanted[2]) + 1) if wanted[2] else size
    if start >= stop:
        return Reply(416, {"Content-Range": f"bytes */{size}"})
    part = {**fields, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
    return Reply(206, part, content[start:stop])


def _api(asked: Asked, matched: re.Match[str], name: str, repo: Repo, commit: str) -> Reply:
    files = repo.commits[commit]
    entries = [_entry(each, content) for each, content in sorted(files.items())]
    found: Any
    if matched["what"] == "tree":
        found = entries
    elif matched["what"] == "paths-info":
        found = [entry for entry in entries if str(entry["path"]) in unquote(asked.body.decode())]
    else:
        siblings = [{"rfilename": each} for each in sorted(files)]
        found = {"id": name, "modelId": name, "sha": commit, "siblings": siblings}
        found["private"] = repo.token is not None
    fields = {"Content-Type": "application/json", "X-Repo-Commit": commit}
    return Reply(200, fields, json.dumps(found).encode())


def _entry(name: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(content)}
    entry["oid"] = git_sha1(content)
    if is_large(name):
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
    return entry
