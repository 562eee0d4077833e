"""docker: what the container engine (Docker or podman) says of the container a process runs in.

- Which container: from the names of the process's control groups, or of its mounts where those do
  not tell. Both are hints that a user could forge; so the engine is asked which process the
  container began with, and the two must be in the same control group.
- Control groups below `user@UID.service` are the user's to name: only an engine of that user is
  asked about them, and such an engine is asked about nothing else.
- What an engine says of a container never changes while the container's first process lives: it is
  remembered so long, once a process has been found to be in it. Each engine has a memory of its
  own, which is consulted only for processes that it may speak for: no engine answers for another.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from identity_broker.attestors.workload import Process, WorkloadAttestor
from identity_broker.attestors.workload.cgroup import (
    UNIFIED,
    parse_cgroup,
    parse_mountinfo,
    segments,
    user_of,
)
from identity_broker.attestors.workload.engine import Engine
from identity_broker.attestors.workload.facts import is_wanted, selectors_of
from identity_broker.attestors.workload.plugins import WorkloadAttestorPlugin, options_of
from identity_broker.domain.procfs import parse_stat
from identity_broker.domain.selector import Selector
from identity_broker.errors import AttestationFailed

DEFAULT_SOCKETS: Final = (Path("/var/run/docker.sock"), Path("/run/podman/podman.sock"))
_MOST_CONTAINERS: Final = 4096
_MOST_IMAGES: Final = 1024
_DIGESTS_HOLD_FOR: Final = 300.0  # a registry's name for an image may come and go: docker pull
# Docker and podman, each with the cgroupfs and the systemd driver. Not "libpod-conmon-…": that is
# podman's own watcher, outside the container.
_GROUP: Final = re.compile(
    r"(?:docker-|libpod-|libpod-payload-)?([0-9a-f]{64})(?:\.scope)?", re.ASCII
)
_MOUNT: Final = re.compile(r".*/(?:overlay-)?containers/([0-9a-f]{64})/.*", re.ASCII)
_MOUNTED: Final = frozenset(
    {"/etc/hostname", "/etc/hosts", "/etc/resolv.conf", "/run/.containerenv"}
)
_DIGEST: Final = re.compile(r"(?:sha256:)?([0-9a-f]{64})", re.ASCII)


def container_ids(groups: Mapping[str, str]) -> tuple[str, ...]:
    """The containers named by control groups, innermost first."""
    found: dict[str, None] = {}
    for path in groups.values():
        for segment in reversed(segments(path)):
            if named := _GROUP.fullmatch(segment):
                found.setdefault(named[1])
    return tuple(found)


def container_ids_of_mounts(mountinfo: bytes) -> tuple[str, ...]:
    """The containers whose files are mounted where engines mount them.

    Raises:
        ValueError: that is no mountinfo.
    """
    found: dict[str, None] = {}
    for mount in parse_mountinfo(mountinfo):
        if mount.point in _MOUNTED and (named := _MOUNT.fullmatch(mount.root)):
            found.setdefault(named[1])
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _First:
    """The process that a container began with."""

    pid: int
    start_time: int
    groups: Mapping[str, str]
    pid_namespace: str


@dataclass(frozen=True, slots=True)
class _Container:
    id: str
    first: _First
    facts: tuple[tuple[str, str], ...]
    image: str


V = TypeVar("V")


class _Latest(Generic[V]):
    """The most recently used of what was put into it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._found: OrderedDict[str, V] = OrderedDict()

    def get(self, key: str) -> V | None:
        if key in self._found:
            self._found.move_to_end(key)
        return self._found.get(key)

    def put(self, key: str, value: V) -> None:
        self._found[key] = value
        self._found.move_to_end(key)
        while len(self._found) > self._most:
            self._found.popitem(last=False)

    def drop(self, key: str) -> None:
        self._found.pop(key, None)

    def __len__(self) -> int:
        return len(self._found)


class _Memory:
    """What one engine has said, while its socket belongs to that user."""

    def __init__(self, owner: int) -> None:
        self.owner = owner
        self.containers: _Latest[_Container] = _Latest(_MOST_CONTAINERS)
        # Until when (the loop's time), and what.
        self.digests: _Latest[tuple[float, tuple[tuple[str, str], ...]]] = _Latest(_MOST_IMAGES)


class DockerAttestor:
    """label, env, image_id, image_digest.

    Args:
        sockets: of the engines; those that do not exist are passed over.
    """

    name = "docker"
    keys = frozenset({"label", "env", "image_id", "image_digest"})

    def __init__(self, sockets: Sequence[Path] = DEFAULT_SOCKETS) -> None:
        self._engines = tuple(Engine(socket) for socket in sockets)
        # Each engine's own, and gone with its owner: what one says is never taken for another's.
        self._memories: dict[Engine, _Memory] = {}

    async def attest(self, process: Process, *, wanted: frozenset[str]) -> frozenset[Selector]:
        try:
            groups = parse_cgroup(process.read("cgroup"))
            named = container_ids(groups) or _named_by_mounts(process)
        except ValueError as exc:
            raise AttestationFailed("the container cannot be told", detail=str(exc)) from exc
        failed: AttestationFailed | None = None
        for id in named:
            for engine, memory in self._may_speak(groups):
                try:
                    container = await _ask(engine, memory, id)
                except AttestationFailed as exc:
                    failed = exc
                    continue
                if container is not None and _is_inside(process, groups, container):
                    memory.containers.put(id, container)
                    return await self._selectors(engine, memory, container, wanted)
        if failed is not None:
            raise failed
        if named:
            raise AttestationFailed(f"no container engine knows container {named[0][:12]}")
        return frozenset()

    def _may_speak(self, groups: Mapping[str, str]) -> Iterator[tuple[Engine, _Memory]]:
        """The engines that may speak for a process in these groups; before any memory of theirs."""
        users = {user for path in groups.values() if (user := user_of(path)) is not None} or {0}
        for engine in self._engines:
            owner = engine.owner()
            if owner is None or owner not in users:
                continue
            memory = self._memories.get(engine)
            if memory is None or memory.owner != owner:
                memory = self._memories[engine] = _Memory(owner)
            yield engine, memory

    async def _selectors(
        self, engine: Engine, memory: _Memory, container: _Container, wanted: frozenset[str]
    ) -> frozenset[Selector]:
        facts = [fact for fact in container.facts if is_wanted(wanted, frozenset({fact[0]}))]
        if container.image and is_wanted(wanted, frozenset({"image_digest"})):
            facts += await _digests_of(engine, memory, container.image)
        return selectors_of(self.name, facts)


async def _ask(engine: Engine, memory: _Memory, id: str) -> _Container | None:
    known = memory.containers.get(id)
    if known is not None:
        if _first_of(known.first.pid) == known.first:
            return known
        memory.containers.drop(id)
    answer = await engine.get(f"/containers/{id}/json")
    return None if answer is None else _container(id, answer)


async def _digests_of(engine: Engine, memory: _Memory, image: str) -> tuple[tuple[str, str], ...]:
    """What the registries that the image came from call it."""
    now = asyncio.get_running_loop().time()
    known = memory.digests.get(image)
    if known is not None and now < known[0]:
        return known[1]
    answer = await engine.get(f"/images/{image}/json") or {}
    digests = {
        digest
        for name in _texts(answer.get("RepoDigests"))
        if (digest := _digest(name.rpartition("@")[2]))
    }
    facts = tuple(("image_digest", digest) for digest in sorted(digests))
    memory.digests.put(image, (now + _DIGESTS_HOLD_FOR, facts))
    return facts


def _named_by_mounts(process: Process) -> tuple[str, ...]:
    if process.link("ns/pid") == _own_pid_namespace():
        return ()  # not in a container; and the common case, for which nothing is parsed
    return container_ids_of_mounts(process.read("mountinfo"))


def _own_pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")  # noqa: PTH115  # not a path


def _is_inside(process: Process, groups: Mapping[str, str], container: _Container) -> bool:
    first = container.first
    named = [
        (controllers, prefix)
        for controllers, path in first.groups.items()
        if (prefix := _up_to(path, container.id)) is not None
    ]
    if named:
        return all(_is_below(groups.get(controllers), prefix) for controllers, prefix in named)
    # The engine was told to use a control group of somebody else, which others may share.
    shared = first.groups.get(UNIFIED, "/")
    return (
        shared != "/"
        and _is_below(groups.get(UNIFIED), shared)
        and process.link("ns/pid") == first.pid_namespace != _own_pid_namespace()
    )


def _up_to(path: str, id: str) -> str | None:
    parts = segments(path)
    for number, part in enumerate(parts, start=1):
        if (named := _GROUP.fullmatch(part)) and named[1] == id:
            return "/" + "/".join(parts[:number])
    return None


def _is_below(path: str | None, prefix: str) -> bool:
    return path is not None and (path == prefix or path.startswith(f"{prefix}/"))


def _first_of(pid: int) -> _First | None:
    try:
        directory = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _First(
            pid,
            parse_stat(_read(directory, "stat")).start_time,
            parse_cgroup(_read(directory, "cgroup")),
            os.readlink("ns/pid", dir_fd=directory),
        )
    except (OSError, ValueError):
        return None
    finally:
        os.close(directory)


def _read(directory: int, name: str) -> bytes:
    with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory), "rb") as file:  # noqa: PTH123
        return file.read(1 << 16)


def _container(id: str, answer: Mapping[str, Any]) -> _Container | None:
    """Read the engine's answer; None: the container does not run, or this is another one."""
    state, config = _object(answer.get("State")), _object(answer.get("Config"))
    pid = state.get("Pid")
    if answer.get("Id") != id or type(pid) is not int or pid <= 0:
        return None
    first = _first_of(pid)
    if first is None:
        return None
    return _Container(id, first, tuple(_facts(answer, config)), _digest(answer.get("Image")))


def _facts(answer: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in _object(config.get("Labels")).items():
        # A name with a colon could be read as another name with another value.
        if isinstance(value, str) and ":" not in key:
            yield "label", f"{key}:{value}"
    for variable in _texts(config.get("Env")):
        yield "env", variable
    if isinstance(name := config.get("Image"), str):
        yield "image_id", name
    manifest = _object(answer.get("ImageManifestDescriptor")).get("digest")
    if image := _digest(answer.get("Image")):
        yield "image_id", image
    for digest in (answer.get("Image"), answer.get("ImageDigest"), manifest):
        if found := _digest(digest):
            yield "image_digest", found


def _digest(value: object) -> str:
    found = _DIGEST.fullmatch(value) if isinstance(value, str) else None
    return f"sha256:{found[1]}" if found else ""


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _texts(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


class DockerOptions(BaseModel):
    """The configuration of the docker attestor.

    `sockets`: of the engines' APIs, asked in this order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sockets: tuple[Path, ...] = Field(default=DEFAULT_SOCKETS, min_length=1)


def _build(table: Mapping[str, Any]) -> Sequence[WorkloadAttestor]:
    return (DockerAttestor(options_of(DockerOptions, "docker", table).sockets),)


PLUGIN: Final = WorkloadAttestorPlugin("docker", _build)
