"""docker: real processes in real control groups, and an engine that talks as engines do."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import pytest

from identity_broker.attestors.workload import Process
from identity_broker.attestors.workload.attestation import Attestation, Attested
from identity_broker.attestors.workload.docker import DockerAttestor, _Latest
from identity_broker.attestors.workload.engine import Engine as EngineClient
from identity_broker.attestors.workload.plugins import build_attestors
from identity_broker.domain.selector_syntax import SelectorSyntax
from identity_broker.errors import AttestationFailed
from identity_broker.localpeer.process import LiveProcess
from support.container_engine import IMAGE, MANIFEST, REGISTRY_DIGEST, Engine, container_engine
from support.processes import Puppet, in_control_group, unshare

ID = "0123456789abcdef" * 4
OTHER = "fedcba9876543210" * 4
ENGINES_ARE_MINE = os.geteuid() == 0


@pytest.fixture
def socket_path() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="idb-engine-"))
    yield folder / "engine.sock"
    shutil.rmtree(folder)


@pytest.fixture
def engine(socket_path: Path) -> Iterator[Engine]:
    with container_engine(socket_path) as found:
        yield found


class Told:
    """A process of which the kernel would say just that."""

    pid = 1
    start_time = 1

    def __init__(self, files: Mapping[str, bytes], pid_namespace: str = "pid:[1]") -> None:
        self._files = files
        self._pid_namespace = pid_namespace

    def read(self, name: str) -> bytes:
        return self._files[name]

    def handle(self, name: str) -> int:
        raise NotImplementedError

    def link(self, name: str) -> str:
        assert name == "ns/pid"
        return self._pid_namespace

    def check(self) -> None:
        pass


async def attest(
    attestor: DockerAttestor, pid: int, wanted: Mapping[str, frozenset[str]] | None = None
) -> Attested:
    with closing(LiveProcess.of_pid(pid)) as process:
        return await Attestation([attestor], 1).attest(process, wanted)


def values(found: Attested) -> set[str]:
    return {str(selector) for selector in found.selectors}


@pytest.mark.parametrize(
    "group",
    [
        f"/docker/{ID}",
        f"/system.slice/docker-{ID}.scope",
        f"/machine.slice/libpod-{ID}.scope/container",
    ],
)
async def test_a_process_in_a_container_has_its_selectors(
    engine: Engine, socket_path: Path, group: str
) -> None:
    attestor = DockerAttestor([socket_path])
    with Puppet() as first, Puppet() as later, in_control_group(group, first.pid, later.pid):
        engine.run(ID, first.pid)
        for pid in (first.pid, later.pid):
            found = await attest(attestor, pid)
            assert found.problems == ()
            assert values(found) == {
                "docker:label:com.example.app:orders",
                "docker:label:url:https://x.example:80/",
                "docker:env:PATH=/usr/local/bin:/usr/bin",
                "docker:env:STAGE=production",
                "docker:env:EMPTY=",
                "docker:image_id:registry.example.org/orders:1.4",
                f"docker:image_id:{IMAGE}",
                f"docker:image_digest:{IMAGE}",
                f"docker:image_digest:{MANIFEST}",
                f"docker:image_digest:{REGISTRY_DIGEST}",
            }
            SelectorSyntax().check_all(found.selectors)
        assert engine.asked == [f"/containers/{ID}/json", f"/images/{IMAGE}/json"]
        found = await attest(attestor, first.pid, {"docker": frozenset({"label"})})
        assert values(found) == {
            "docker:label:com.example.app:orders",
            "docker:label:url:https://x.example:80/",
        }
        first.kill()
        later.kill()


async def test_who_only_has_a_group_of_that_name_is_not_in_the_container(
    engine: Engine, socket_path: Path
) -> None:
    """A group named like the container's, elsewhere: what a user's own systemd lets him make."""
    attestor = DockerAttestor([socket_path])
    forged = f"/user.slice/user-4242.slice/user@4242.service/app.slice/docker-{ID}.scope"
    nested = f"/idb-test.service/docker-{ID}.scope"  # a service with delegated groups
    with (
        Puppet() as first,
        Puppet() as user,
        Puppet() as service,
        in_control_group(f"/system.slice/docker-{ID}.scope", first.pid),
        in_control_group(forged, user.pid),
        in_control_group(nested, service.pid),
    ):
        engine.run(ID, first.pid)
        for _ in range(2):  # before and after it is remembered
            for pid in (user.pid, service.pid):
                found = await attest(attestor, pid)
                assert found.selectors == frozenset()
                assert found.problems == (f"docker: no container engine knows container {ID[:12]}",)
            assert values(await attest(attestor, first.pid))
        for puppet in (first, user, service):
            puppet.kill()


async def test_a_user_s_engine_speaks_for_that_user_s_containers_alone(
    engine: Engine, socket_path: Path
) -> None:
    if not ENGINES_ARE_MINE:
        pytest.skip("only root may give an engine's socket to another user")
    os.chown(socket_path, 4242, 4242)
    theirs = f"/user.slice/user-4242.slice/user@4242.service/user.slice/libpod-{ID}.scope"
    system = f"/system.slice/docker-{OTHER}.scope"
    attestor = DockerAttestor([socket_path])
    with (
        Puppet() as own,
        Puppet() as stranger,
        in_control_group(theirs, own.pid),
        in_control_group(system, stranger.pid),
    ):
        engine.run(ID, own.pid)
        engine.run(OTHER, stranger.pid)  # it would say anything
        assert "docker:label:com.example.app:orders" in values(await attest(attestor, own.pid))
        assert (await attest(attestor, stranger.pid)).selectors == frozenset()
        assert f"/containers/{OTHER}/json" not in engine.asked
        own.kill()
        stranger.kill()


async def test_a_user_s_engine_never_answers_for_root_s(socket_path: Path) -> None:
    """Not even through what is remembered: it was asked about root's container's id before."""
    if not ENGINES_ARE_MINE:
        pytest.skip("only root may give an engine's socket to another user")
    user_path = socket_path.parent / "user.sock"
    system = f"/system.slice/docker-{ID}.scope"
    theirs = f"/user.slice/user-4242.slice/user@4242.service/user.slice/libpod-{OTHER}.scope"
    forged = f"/user.slice/user-4242.slice/user@4242.service/app.slice/docker-{ID}.scope"
    wanted = {"docker": frozenset({"label", "image_digest"})}
    with (
        container_engine(socket_path) as root,
        container_engine(user_path) as user,
        Puppet() as victim,
        Puppet() as attacker,
        Puppet() as own,
        in_control_group(system, victim.pid),
        in_control_group(forged, attacker.pid),
        in_control_group(theirs, own.pid),
    ):
        os.chown(user_path, 4242, 4242)
        root.run(ID, victim.pid, Labels={"app": "harmless"})
        user.run(ID, victim.pid, Labels={"app": "payments"})
        user.run(OTHER, own.pid, Labels={"app": "own"})
        user.images[IMAGE] = {"RepoDigests": [f"x@sha256:{'6' * 64}"]}
        attestor = DockerAttestor([user_path, socket_path])
        honest = values(await attest(DockerAttestor([socket_path]), victim.pid, wanted))
        for _ in range(2):
            # It fills whatever memory there is: with the container's id, and the image's.
            assert (await attest(attestor, attacker.pid, wanted)).selectors == frozenset()
            assert f"docker:image_digest:sha256:{'6' * 64}" in values(
                await attest(attestor, own.pid, wanted)
            )
            found = values(await attest(attestor, victim.pid, wanted))
            assert found == honest
            assert "docker:label:app:harmless" in found
            assert f"docker:image_digest:{REGISTRY_DIGEST}" in found
        # An answer that did not fit the process was not kept; one that did was.
        asked = user.asked.count(f"/containers/{ID}/json")
        assert (asked, user.asked.count(f"/containers/{OTHER}/json")) == (2, 1)
        # And the other way round: what root's engine said is nothing to the user's process.
        assert (await attest(attestor, attacker.pid, wanted)).selectors == frozenset()
        # The socket is another user's by now: what the first one's engine said is forgotten.
        os.chown(user_path, 0, 0)
        user.containers.clear()
        assert values(await attest(attestor, victim.pid, wanted)) == honest
        for puppet in (victim, attacker, own):
            puppet.kill()


async def test_what_an_image_is_called_is_asked_again_after_a_while(
    engine: Engine, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attestor = DockerAttestor([socket_path])
    with Puppet() as first, in_control_group(f"/docker/{ID}", first.pid):
        engine.run(ID, first.pid)
        for _ in range(2):
            assert f"docker:image_digest:{REGISTRY_DIGEST}" in values(
                await attest(attestor, first.pid)
            )
        assert engine.asked.count(f"/images/{IMAGE}/json") == 1
        loop = asyncio.get_running_loop()
        later = loop.time() + 301
        monkeypatch.setattr(loop, "time", lambda: later)
        engine.images[IMAGE] = {"RepoDigests": []}
        with closing(LiveProcess.of_pid(first.pid)) as process:
            found = await attestor.attest(process, wanted=frozenset({"image_digest"}))
        assert f"image_digest:{REGISTRY_DIGEST}" not in {item.value for item in found}
        assert engine.asked.count(f"/images/{IMAGE}/json") == 2
        first.kill()


def test_what_is_remembered_of_an_engine_is_bounded() -> None:
    kept: _Latest[int] = _Latest(3)
    for number in range(5):
        kept.put(str(number), number)
        kept.get("2")
    assert len(kept) == 3
    assert (kept.get("2"), kept.get("1"), kept.get("4")) == (2, None, 4)


async def test_a_container_that_was_started_again_is_asked_about_again(
    engine: Engine, socket_path: Path
) -> None:
    attestor = DockerAttestor([socket_path])
    group = f"/docker/{ID}"
    with Puppet() as first, Puppet() as second:
        with in_control_group(group, first.pid):
            engine.run(ID, first.pid, Labels={"generation": "1"})
            assert "docker:label:generation:1" in values(await attest(attestor, first.pid))
            first.kill()
        with in_control_group(group, second.pid):
            # The engine has not noticed yet: it names a process that has ended.
            found = await attest(attestor, second.pid)
            assert found.selectors == frozenset()
            engine.run(ID, second.pid, Labels={"generation": "2"})
            assert "docker:label:generation:2" in values(await attest(attestor, second.pid))
            second.kill()


async def test_a_process_of_no_container_asks_no_engine(engine: Engine, socket_path: Path) -> None:
    assert await attest(DockerAttestor([socket_path]), os.getpid()) == Attested(frozenset())
    assert engine.asked == []


async def test_mounts_name_a_container_and_prove_nothing(engine: Engine, socket_path: Path) -> None:
    """Bind mounts and names anybody can make; the group and the PID namespace he cannot."""
    if not ENGINES_ARE_MINE:
        pytest.skip("an engine of another user is not asked about system containers")
    attestor = DockerAttestor([socket_path])
    fake = socket_path.parent / "var" / "lib" / "docker" / "containers" / ID
    fake.mkdir(parents=True)
    (fake / "hostname").write_text("x")
    command = unshare("-Urmpf", "--mount-proc", "--kill-child")
    script = f'mount --bind {fake / "hostname"} /etc/hostname && exec "$0" "$@"'
    with Puppet(*command, "sh", "-c", script) as outer:
        assert outer.ask("os.getpid()") == "1"
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        pid = int(children[0])
        engine.run(ID, os.getpid())
        found = await attest(attestor, pid)
        assert engine.asked == [f"/containers/{ID}/json"]  # it was taken for a hint
        assert found.selectors == frozenset()
        assert found.problems


async def test_a_shared_group_needs_the_pid_namespace_as_well(
    engine: Engine, socket_path: Path
) -> None:
    """podman can leave a container in the group of its service: mounts name it then."""
    mountinfo = (
        f"1 2 8:1 /var/lib/containers/storage/overlay-containers/{ID}/userdata/hostname "
        "/etc/hostname rw - ext4 /dev/x rw\n"
    ).encode()
    attestor = DockerAttestor([socket_path])
    with Puppet(*unshare("-Urpf", "--mount-proc", "--kill-child")) as outer:
        outer.ask("os.getpid()")
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        first = int(children[0])
        with in_control_group("/idb-test-pod.service", first, outer.pid):
            engine.run(ID, first)
            namespace = str(Path(f"/proc/{first}/ns/pid").readlink())
            group = b"0::/idb-test-pod.service\n"

            async def ask(cgroup: bytes, pid_namespace: str) -> int:
                process: Process = Told({"cgroup": cgroup, "mountinfo": mountinfo}, pid_namespace)
                try:
                    return len(await attestor.attest(process, wanted=frozenset({"label"})))
                except AttestationFailed:
                    return -1

            assert await ask(group, namespace) == 2
            assert await ask(group, "pid:[1]") == -1
            assert await ask(b"0::/another.service\n", namespace) == -1
            assert await ask(b"0::/\n", namespace) == -1
            # The agent's own: not in a container, whatever the mounts say.
            own = str(Path("/proc/self/ns/pid").readlink())
            assert await ask(group, own) == 0
            outer.kill()


# --- engines that misbehave ---------------------------------------------------------------------

IN_CONTAINER = Told({"cgroup": f"0::/docker/{ID}\n".encode()})


async def test_an_engine_that_hangs_costs_its_selectors_alone(
    engine: Engine, socket_path: Path
) -> None:
    if not ENGINES_ARE_MINE:
        pytest.skip("an engine of another user is not asked about system containers")
    engine.hangs.set()
    attestation = Attestation([DockerAttestor([socket_path]), *build_attestors("unix", {})], 0.3)
    with Puppet() as first, in_control_group(f"/docker/{ID}", first.pid):
        engine.run(ID, first.pid)
        with closing(LiveProcess.of_pid(first.pid)) as process:
            started = time.monotonic()
            found = await attestation.attest(process, None)
            assert time.monotonic() - started < 3
            assert "docker: no answer within 0.3 s" in found.problems
            assert f"unix:uid:{os.geteuid()}" in values(found)
            engine.hangs.clear()
            engine.released.set()
            found = await attestation.attest(process, {"docker": frozenset({"label"})})
            assert found.problems == ()
            assert len(found.selectors) == 2
        first.kill()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "does not answer as one should"),
        (b"HTTP/1.1 200 OK\r\n", "does not answer as one should"),
        (b"SSH-2.0-OpenSSH_9\r\n\r\n", "does not answer as one should"),
        (b"HTTP/1.1 2oo OK\r\n\r\n", "does not answer as one should"),
        (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "does not answer as one should"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000, "does not answer as one should"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 5, "does not answer as one should"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}", "does not answer as one should"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n{}", "does not answer as one should"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1e9\r\n\r\n{}", "does not answer as one should"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999\r\n\r\n", "does not answer as one should"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{}",
            "does not answer as one should",
        ),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}xx",
            "does not answer as one should",
        ),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffff\r\n{}",
            "does not answer as one should",
        ),
        (b"HTTP/1.1 200 OK\r\n\r\n{", "does not answer with JSON"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 200_000, "does not answer with JSON"),
        (b"HTTP/1.1 200 OK\r\n\r\n\xff\xfe", "does not answer with JSON"),
        (b"HTTP/1.1 200 OK\r\n\r\n[]", "does not answer with an object"),
        (b"HTTP/1.1 500 Oh no\r\nContent-Length: 2\r\n\r\n{}", "answers with status 500"),
        (b"HTTP/1.1 301 Moved\r\nContent-Length: 2\r\n\r\n{}", "answers with status 301"),
    ],
)
async def test_an_engine_that_talks_nonsense_is_a_problem(
    engine: Engine, socket_path: Path, raw: bytes, message: str
) -> None:
    engine.raw = raw
    with pytest.raises(AttestationFailed, match=message):
        await EngineClient(socket_path).get("/containers/x/json")


@pytest.mark.parametrize(
    "raw",
    [
        b'HTTP/1.1 200 OK\r\n\r\n{"a": 1}',
        b'HTTP/1.0 200 OK\r\ncontent-length: 8\r\n\r\n{"a": 1}trailing',
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n"
        b'3;x=y\r\n{"a\r\n5\r\n": 1}\r\n0\r\n\r\n',
    ],
)
async def test_an_answer_may_be_framed_in_any_way(
    engine: Engine, socket_path: Path, raw: bytes
) -> None:
    engine.raw = raw
    assert await EngineClient(socket_path).get("/x") == {"a": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"Id": OTHER},
        {"State": {"Status": "exited", "Running": False, "Pid": 0}},
        {"State": None},
        {"State": {"Pid": "1"}},
        {"State": {"Pid": True}},
        {"State": {"Pid": -1}},
        {"State": {"Pid": 2**40}},
    ],
)
async def test_an_answer_about_something_else_is_none(
    engine: Engine, socket_path: Path, change: dict[str, object]
) -> None:
    attestor = DockerAttestor([socket_path])
    engine.run(ID, os.getpid())
    engine.containers[ID] |= change
    with pytest.raises(AttestationFailed, match="no container engine knows"):
        await attestor.attest(IN_CONTAINER, wanted=frozenset())


async def test_what_cannot_be_a_selector_is_left_out(engine: Engine, socket_path: Path) -> None:
    attestor = DockerAttestor([socket_path])
    with Puppet() as first, in_control_group(f"/docker/{ID}", first.pid):
        engine.run(
            ID,
            first.pid,
            Labels={
                "good": "yes",
                "team:prod": "x",  # would read as team = prod:x
                "long": "x" * 2000,
                "control": "a\nb",
                "": "nameless",
                " padded": "x",
                "number": 5,
            },
            Env=["GOOD=yes", "NO_VALUE", "=x", "CONTROL=\x1b[0m", 5, "LONG=" + "x" * 2000],
            Image="with a space",
        )
        engine.images.clear()
        found = await attest(attestor, first.pid)
        assert values(found) == {
            "docker:label:good:yes",
            "docker:env:GOOD=yes",
            f"docker:image_id:{IMAGE}",
            f"docker:image_digest:{IMAGE}",
            f"docker:image_digest:{MANIFEST}",
        }
        SelectorSyntax().check_all(found.selectors)
        first.kill()


async def test_podman_s_shape_of_an_answer(engine: Engine, socket_path: Path) -> None:
    attestor = DockerAttestor([socket_path])
    with Puppet() as first, in_control_group(f"/machine.slice/libpod-{ID}.scope", first.pid):
        engine.run(ID, first.pid, Labels=None, Env=None)
        answer = engine.containers[ID]
        del answer["ImageManifestDescriptor"]
        answer["Image"] = IMAGE.removeprefix("sha256:")
        answer["ImageDigest"] = REGISTRY_DIGEST
        found = await attest(attestor, first.pid)
        assert values(found) == {
            "docker:image_id:registry.example.org/orders:1.4",
            f"docker:image_id:{IMAGE}",
            f"docker:image_digest:{IMAGE}",
            f"docker:image_digest:{REGISTRY_DIGEST}",
        }
        first.kill()


async def test_the_next_engine_is_asked_when_one_is_away(engine: Engine, socket_path: Path) -> None:
    folder = socket_path.parent
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "dead"))
    attestor = DockerAttestor([folder / "absent", folder / "dead", socket_path])
    with Puppet() as first, in_control_group(f"/docker/{ID}", first.pid):
        found = await attest(attestor, first.pid)
        assert found.problems == (
            f"docker: the container engine at {folder / 'dead'} cannot be reached",
        )
        engine.run(ID, first.pid)
        assert (await attest(attestor, first.pid)).selectors
        first.kill()


async def test_no_connection_to_an_engine_is_left_open(engine: Engine, socket_path: Path) -> None:
    engine.run(ID, os.getpid())
    client = EngineClient(socket_path)
    await client.get(f"/containers/{ID}/json")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        await client.get(f"/containers/{ID}/json")
        assert await client.get("/containers/x/json") is None
    engine.hangs.set()
    waiting = [asyncio.create_task(client.get("/x")) for _ in range(5)]
    await asyncio.sleep(0.1)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    engine.released.set()
    async with asyncio.timeout(5):
        while len(list(Path("/proc/self/fd").iterdir())) > before:
            await asyncio.sleep(0.01)
