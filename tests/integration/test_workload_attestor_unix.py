"""unix: user, groups and program of real processes, and of those that pretend."""

from __future__ import annotations

import asyncio
import grp
import hashlib
import os
import pwd
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from identity_broker.attestors.workload.attestation import Attestation, Attested
from identity_broker.attestors.workload.owner import UnixOwner
from identity_broker.attestors.workload.plugins import build_attestors
from identity_broker.attestors.workload.program import ProgramDigests, UnixDigest, UnixPath
from identity_broker.attestors.workload.unix import UnixNames, _Names
from identity_broker.domain.selector_syntax import SelectorSyntax
from identity_broker.errors import AttestationFailed, CallerUnknown
from identity_broker.localpeer.process import LiveProcess
from support.processes import Puppet, became, unshare

ROOT = os.geteuid() == 0
SLEEP = Path("/bin/sleep").resolve()


def values(found: Attested) -> set[str]:
    return {str(selector) for selector in found.selectors}


async def attest(
    pid: int, wanted: Mapping[str, frozenset[str]] | None = None, **table: object
) -> Attested:
    with closing(LiveProcess.of_pid(pid)) as process:
        return await Attestation(build_attestors("unix", table), 10).attest(process, wanted)


@contextmanager
def running(*command: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program, once it is that program."""
    started = subprocess.Popen(command)
    try:
        if command[0] == SLEEP:
            became(started.pid, SLEEP.name)
        yield started
    finally:
        started.kill()
        started.wait()


async def test_everything_that_is_vouched_for_is_true_and_can_be_asked_for() -> None:
    with running(SLEEP, "60") as child:
        found = await attest(child.pid)
    assert found.problems == ()
    assert values(found) == {
        f"unix:uid:{os.geteuid()}",
        f"unix:gid:{os.getegid()}",
        f"unix:user:{pwd.getpwuid(os.geteuid()).pw_name}",
        f"unix:group:{grp.getgrgid(os.getegid()).gr_name}",
        f"unix:path:{SLEEP}",
        f"unix:sha256:{hashlib.sha256(SLEEP.read_bytes()).hexdigest()}",
        *(f"unix:supplementary_gid:{gid}" for gid in os.getgroups()),
        *(f"unix:supplementary_group:{grp.getgrgid(gid).gr_name}" for gid in os.getgroups()),
    }
    SelectorSyntax().check_all(found.selectors)


async def test_groups_beside_the_own_one() -> None:
    if not ROOT:
        pytest.skip("only root may choose its groups")
    with Puppet() as puppet:
        puppet.do("os.setgroups([0, 1, 4242]); os.setegid(4243); os.seteuid(4244)")
        found = await attest(puppet.pid)
    assert {
        "unix:uid:4244",
        "unix:gid:4243",
        "unix:supplementary_gid:0",
        "unix:supplementary_gid:1",
        "unix:supplementary_gid:4242",
        f"unix:supplementary_group:{grp.getgrgid(1).gr_name}",
    } <= values(found)
    # Without a name: no selector, and no problem.
    assert not [value for value in values(found) if value.startswith(("unix:user", "unix:group"))]
    assert found.problems == ()


async def test_what_nobody_asks_for_is_left_out() -> None:
    me = os.getpid()
    found = await attest(me, {"unix": frozenset({"uid", "path"})})
    assert {value.split(":")[1] for value in values(found)} <= {
        *("uid", "gid", "supplementary_gid", "path")
    }
    assert await attest(me, {}) == Attested(frozenset())
    assert await attest(me, {"docker": frozenset({"label"})}) == Attested(frozenset())
    everything = await attest(me, {"unix": frozenset()})
    assert everything == await attest(me, None)


# --- paths --------------------------------------------------------------------------------------


async def path_of(pid: int) -> str | None:
    with closing(LiveProcess.of_pid(pid)) as process:
        found = await UnixPath().attest(process, wanted=frozenset())
    assert len(found) <= 1
    return next((selector.value.removeprefix("path:") for selector in found), None)


async def test_a_program_keeps_its_path_when_it_is_replaced(tmp_path: Path) -> None:
    program = tmp_path / "program"
    shutil.copy(SLEEP, program)
    with running(program, "60") as child:
        became(child.pid, "program")
        assert await path_of(child.pid) == str(program)
        replacement = tmp_path / "new"
        shutil.copy("/bin/true", replacement)
        replacement.replace(program)
        assert await path_of(child.pid) == str(program)
        program.unlink()
        assert await path_of(child.pid) == str(program)


async def test_a_name_that_looks_deleted_is_a_name(tmp_path: Path) -> None:
    program = tmp_path / "program (deleted)"
    shutil.copy(SLEEP, program)
    with running(program, "60") as child:
        became(child.pid, "program (delete")
        assert await path_of(child.pid) == str(program)


async def test_a_mount_namespace_does_not_lend_famous_paths(tmp_path: Path) -> None:
    """Anybody may mount his program over /bin/true in a namespace of his own."""
    command = unshare("-Urm")
    evil = tmp_path / "evil"
    shutil.copy(SLEEP, evil)
    target = Path("/bin/true").resolve()
    script = f"mount --bind {evil} {target} && exec {target} 60"
    with running(*command, "sh", "-c", script) as child:
        became(child.pid, "true")
        with closing(LiveProcess.of_pid(child.pid)) as process:
            assert process.link("exe") == str(target)  # what a trusting attestor would say
        assert await path_of(child.pid) is None

        # The same program, run by a process that has never left the agent's namespace.
        shortcut = f"/proc/{child.pid}/root{target}"
        with running(shortcut, "60") as other:
            became(other.pid, "true")
            with closing(LiveProcess.of_pid(other.pid)) as process:
                assert process.link("exe") == str(target)
                assert process.link("ns/mnt") == str(Path("/proc/self/ns/mnt").readlink())
            assert await path_of(other.pid) is None

        # What it is can still be told by its content.
        found = await attest(child.pid, {"unix": frozenset({"sha256"})})
        assert values(found) == {f"unix:sha256:{hashlib.sha256(SLEEP.read_bytes()).hexdigest()}"}


async def test_a_removed_program_of_a_mount_namespace_has_no_path(tmp_path: Path) -> None:
    command = unshare("-Urm")
    target = Path("/bin/true").resolve()
    script = (
        f"mount -t tmpfs none {tmp_path} && cp {SLEEP} {tmp_path}/evil && "
        f"mount --bind {tmp_path}/evil {target} && exec {target} 60"
    )
    with running(*command, "sh", "-c", script) as child:
        became(child.pid, "true")
        assert await path_of(child.pid) is None


async def test_a_sandboxed_service_has_the_path_that_the_agent_sees() -> None:
    """systemd's PrivateTmp= and ProtectSystem= give services mount namespaces, too."""
    command = unshare("-Urm")
    with running(*command, SLEEP, "60") as child:
        became(child.pid, "sleep")
        with closing(LiveProcess.of_pid(child.pid)) as process:
            assert process.link("ns/mnt") != str(Path("/proc/self/ns/mnt").readlink())
        assert await path_of(child.pid) == str(SLEEP)


async def test_a_program_without_a_mount_has_neither_path_nor_digest() -> None:
    with Puppet() as puppet:
        puppet.do(
            f"m = os.memfd_create('x', 0); os.write(m, open({str(SLEEP)!r}, 'rb').read()); "
            "r = os.open(f'/proc/self/fd/{m}', os.O_RDONLY); os.close(m); os.set_inheritable(r, 1)"
        )
        name = puppet.ask("r")
        puppet.tell("os.execv(f'/proc/self/fd/{r}', ['x', '60'])")
        became(puppet.pid, name)
        assert "memfd" in str(Path(f"/proc/{puppet.pid}/exe").readlink())
        found = await attest(puppet.pid, {"unix": frozenset({"path", "sha256"})})
    assert found == Attested(frozenset())


async def test_a_file_system_that_the_agent_has_not_mounted_is_not_asked(tmp_path: Path) -> None:
    """Anybody may mount one in a user namespace (FUSE, too), and it may lie about the ctime."""
    target = tmp_path / "evil"
    script = f"mount -t tmpfs none {tmp_path} && cp {SLEEP} {target} && exec {target} 60"
    with running(*unshare("-Urm"), "sh", "-c", script) as child:
        became(child.pid, "evil")
        found = await attest(child.pid, {"unix": frozenset({"path", "sha256"})})
    assert found == Attested(frozenset())


# --- digests ------------------------------------------------------------------------------------


async def digest_of(digests: ProgramDigests, path: Path) -> str:
    return await asyncio.to_thread(digest_now, digests, path)


def digest_now(digests: ProgramDigests, path: Path) -> str:
    handle = os.open(path, os.O_PATH)
    try:
        return digests.of(handle)
    finally:
        os.close(handle)


async def test_a_digest_is_remembered_and_a_change_is_never_missed(tmp_path: Path) -> None:
    """Even where size and mtime are put back: the ctime is nobody's to set."""
    program = tmp_path / "program"
    program.write_bytes(b"honest" * 1000)
    os.utime(program, ns=(10**18, 10**18))
    digests = ProgramDigests()
    honest = await digest_of(digests, program)
    assert not digests._known  # it has changed a moment ago
    await asyncio.sleep(2.1)
    assert await digest_of(digests, program) == honest
    assert len(digests._known) == 1
    assert await digest_of(digests, program) == honest

    before = program.stat()
    with program.open("r+b") as file:
        file.write(b"hijack")
    os.utime(program, ns=(10**18, 10**18))
    after = program.stat()
    assert (before.st_ino, before.st_size, before.st_mtime_ns) == (
        *(after.st_ino, after.st_size, after.st_mtime_ns),
    )
    assert await digest_of(digests, program) == hashlib.sha256(program.read_bytes()).hexdigest()
    assert await digest_of(digests, program) != honest


async def test_many_ask_and_it_is_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program"
    shutil.copy(SLEEP, program)
    await asyncio.sleep(2.1)
    hashed: list[int] = []
    real = hashlib.sha256

    def counted() -> object:
        hashed.append(1)
        return real()

    monkeypatch.setattr(hashlib, "sha256", counted)
    with running(program, "60") as child:
        became(child.pid, "program")
        with closing(LiveProcess.of_pid(child.pid)) as process:
            attestor = UnixDigest(ProgramDigests())
            before = len(list(Path("/proc/self/fd").iterdir()))
            tasks = [
                asyncio.create_task(attestor.attest(process, wanted=frozenset())) for _ in range(50)
            ]
            await asyncio.sleep(0)
            tasks.pop(0).cancel()  # one who cannot wait does not end it for the others
            tasks.pop().cancel()
            found = await asyncio.gather(*tasks)
            digest = real(SLEEP.read_bytes()).hexdigest()
            assert {str(item) for each in found for item in each} == {f"unix:sha256:{digest}"}
            assert hashed == [1]
            assert len(list(Path("/proc/self/fd").iterdir())) <= before


async def test_limits_of_what_is_hashed(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"x" * 1001)
    with pytest.raises(AttestationFailed, match="no more than 1000"):
        await digest_of(ProgramDigests(1000), program)
    program.write_bytes(b"x" * 1000)
    assert await digest_of(ProgramDigests(1000), program)
    with pytest.raises(AttestationFailed, match="not a regular file"):
        await digest_of(ProgramDigests(), Path("/dev/null"))
    found = await attest(os.getpid(), {"unix": frozenset({"sha256"})}, max_program_bytes=1000)
    assert found.selectors == frozenset()
    assert found.problems[0].startswith("unix: the program has ")


async def test_a_program_that_grows_while_it_is_read_has_no_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"x" * 20_000_000)
    digests = ProgramDigests()
    real = os.read

    def grows(descriptor: int, size: int) -> bytes:
        with program.open("ab") as file:
            file.write(b"more")
        return real(descriptor, size)

    with monkeypatch.context() as patched:
        patched.setattr(os, "read", grows)
        with pytest.raises(AttestationFailed, match="changes"):
            digest_now(digests, program)
    assert not digests._known


async def test_the_digests_remembered_are_bounded(tmp_path: Path) -> None:
    digests = ProgramDigests(remembered=3)
    programs = []
    for number in range(6):
        programs.append(tmp_path / f"p{number}")
        programs[-1].write_bytes(b"%d" % number)
    await asyncio.sleep(2.1)
    for program in programs:
        await digest_of(digests, program)
    assert len(digests._known) == 3


async def test_a_program_that_may_not_be_read_is_a_problem() -> None:
    if ROOT:
        pytest.skip("root may read every program")
    found = await attest(1)
    assert "unix:uid:0" in values(found)
    assert found.problems == ("unix: the agent may not read /proc/PID/exe of this process",)


# --- names --------------------------------------------------------------------------------------


async def test_a_user_database_that_hangs_costs_names_alone() -> None:
    release = threading.Event()
    asked: list[int] = []

    def hangs(number: int) -> str:
        asked.append(number)
        release.wait(20)
        return "late"

    names = UnixNames()
    names._users = _Names(hangs)
    attestation = Attestation([UnixOwner(), names, UnixDigest(ProgramDigests())], 0.3)
    with closing(LiveProcess.of_pid(os.getpid())) as process:
        for _ in range(3):
            found = await attestation.attest(process, None)
            assert f"unix:uid:{os.geteuid()}" in values(found)
            assert found.problems == ("unix: no answer within 0.3 s",)
        assert asked == [os.geteuid()]  # not a thread for everyone who gave up
        release.set()
        async with asyncio.timeout(10):
            while "unix:user:late" not in values(await attestation.attest(process, None)):
                await asyncio.sleep(0.01)
    assert asked == [os.geteuid()]  # remembered


async def test_a_process_that_ended_has_nothing_said_of_it() -> None:
    with running(SLEEP, "60") as child, closing(LiveProcess.of_pid(child.pid)) as process:
        child.kill()
        child.wait()
        for attestor in build_attestors("unix", {}):
            with pytest.raises(CallerUnknown):
                await attestor.attest(process, wanted=frozenset())
