"""All attestors at once: what fails is left out, and nothing is said of another process."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from identity_broker.attestors.workload import Process
from identity_broker.attestors.workload.attestation import Attestation, Attested
from identity_broker.attestors.workload.owner import UnixOwner
from identity_broker.attestors.workload.plugins import build_attestors
from identity_broker.domain.selector import Selector
from identity_broker.errors import AttestationFailed, CallerUnknown, ConfigError, ProcessChanged
from identity_broker.localpeer.process import LiveProcess
from support.processes import Puppet, became, in_pid_namespace, unshare

Act = Callable[[Process], Awaitable[frozenset[Selector]]]


class Scripted:
    """An attestor of another package."""

    def __init__(self, name: str, act: Act, keys: frozenset[str] = frozenset()) -> None:
        self.name = name
        self.keys = keys
        self.asked: list[frozenset[str]] = []
        self._act = act

    async def attest(self, process: Process, *, wanted: frozenset[str]) -> frozenset[Selector]:
        self.asked.append(wanted)
        return await self._act(process)


def says(*texts: str) -> Act:
    async def act(_process: Process) -> frozenset[Selector]:
        return frozenset(map(Selector.parse, texts))

    return act


def raises(error: BaseException) -> Act:
    async def act(_process: Process) -> frozenset[Selector]:
        raise error

    return act


@pytest.fixture
def me() -> Iterator[LiveProcess]:
    with closing(LiveProcess.of_pid(os.getpid())) as process:
        yield process


async def test_what_fails_is_left_out_and_told(me: LiveProcess) -> None:
    async def hangs(_process: Process) -> frozenset[Selector]:
        await asyncio.sleep(60)
        return frozenset()

    attestation = Attestation(
        [
            Scripted("good", says("good:x", "good:y")),
            Scripted("away", raises(AttestationFailed("the engine is away", detail="secret"))),
            Scripted("buggy", raises(KeyError("a bug"))),
            Scripted("slow", hangs),
            Scripted("liar", says("liar:x", "unix:uid:0")),
            Scripted("good", says("good:z")),
        ],
        deadline=0.2,
    )
    started = time.monotonic()
    found = await attestation.attest(me, None)
    assert time.monotonic() - started < 2  # beside one another
    assert {str(selector) for selector in found.selectors} == {"good:x", "good:y", "good:z"}
    assert found.problems == (
        "away: the engine is away",
        "buggy: failed; the agent's log says how",
        "liar: vouches for selectors of another type",
        "slow: no answer within 0.2 s",
    )


async def test_only_who_is_asked_for_is_asked(me: LiveProcess) -> None:
    one = Scripted("one", says("one:a:1"), frozenset({"a", "b"}))
    two = Scripted("two", says("two:x"))
    attestation = Attestation([one, two])
    assert (await attestation.attest(me, {})).selectors == frozenset()
    assert (await attestation.attest(me, {"one": frozenset({"c"})})).selectors == frozenset()
    assert one.asked == two.asked == []
    await attestation.attest(me, {"one": frozenset({"b", "c"})})
    await attestation.attest(me, {"one": frozenset(), "two": frozenset({"anything"})})
    await attestation.attest(me, None)
    assert one.asked == [frozenset({"b", "c"}), frozenset(), frozenset()]
    assert two.asked == [frozenset({"anything"}), frozenset()]


@pytest.mark.parametrize("error", [CallerUnknown(), ProcessChanged()])
@pytest.mark.parametrize("others", [0, 2])
async def test_an_attestor_that_notices_ends_it_all(
    me: LiveProcess, error: CallerUnknown | ProcessChanged, others: int
) -> None:
    cancelled = 0

    async def waits(_process: Process) -> frozenset[Selector]:
        nonlocal cancelled
        try:
            await asyncio.sleep(60)
        finally:
            cancelled += 1
        return frozenset()

    attestors = [Scripted("slow", waits) for _ in range(others)]
    with pytest.raises(type(error)):
        await Attestation([Scripted("x", raises(error)), *attestors], 60).attest(me, None)
    assert cancelled == others


async def test_a_caller_that_goes_away_takes_its_attestation_with_it(me: LiveProcess) -> None:
    cancelled = 0

    async def waits(_process: Process) -> frozenset[Selector]:
        nonlocal cancelled
        try:
            await asyncio.sleep(60)
        finally:
            cancelled += 1
        return frozenset()

    task = asyncio.create_task(
        Attestation([Scripted("a", waits), Scripted("b", waits)], 60).attest(me, None)
    )
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancelled == 2


@pytest.mark.parametrize("attestors", [1, 2])
async def test_who_dies_meanwhile_gets_nothing(attestors: int) -> None:
    with Puppet() as puppet, closing(LiveProcess.of_pid(puppet.pid)) as process:

        async def kills(_process: Process) -> frozenset[Selector]:
            puppet.kill()
            return frozenset({Selector("x", "anything")})

        scripted = [Scripted("x", kills) for _ in range(attestors)]
        with pytest.raises(CallerUnknown):
            await Attestation([*scripted, UnixOwner()]).attest(process, {"x": frozenset()})


async def test_who_becomes_another_program_meanwhile_gets_nothing() -> None:
    with Puppet() as puppet, closing(LiveProcess.of_pid(puppet.pid)) as process:

        async def execs(_process: Process) -> frozenset[Selector]:
            puppet.tell("os.execv('/bin/sleep', ['sleep', '60'])")
            became(puppet.pid, "sleep")
            return frozenset()

        with pytest.raises(ProcessChanged):
            await Attestation([Scripted("x", execs), UnixOwner()]).attest(process, None)


def test_a_pid_that_is_used_again_meanwhile_lends_nothing(tmp_path: Path) -> None:
    """The caller dies while it is attested, and a victim gets its pid before the answer."""
    script = """
from identity_broker.attestors.workload.attestation import Attestation
from identity_broker.attestors.workload.plugins import build_attestors
from identity_broker.domain.selector import Selector
from identity_broker.errors import CallerUnknown
from identity_broker.localpeer.process import LiveProcess
path = sys.argv[1]
listener = socket.socket(socket.AF_UNIX); listener.bind(path); listener.listen()
code = "import socket,sys;s=socket.socket(1);s.connect(sys.argv[1]);print(1,flush=True);input()"
caller = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True)
caller.stdout.readline()
connection, _ = listener.accept()
process = LiveProcess.of_connection(connection)

class ByNumber:
    '''Trusts the number, as an attestor should not.'''
    name, keys = "naive", frozenset()
    async def attest(self, process, *, wanted):
        caller.kill(); caller.wait()
        self.victim = take(process.pid, ["sleep", "60"])
        until(lambda: "python" not in os.readlink(f"/proc/{process.pid}/exe"))
        return frozenset({Selector("naive", os.readlink(f"/proc/{process.pid}/exe"))})

naive = ByNumber()
for attestors in ([naive], [naive, *build_attestors("unix", {})]):
    try:
        print(asyncio.run(Attestation(attestors).attest(process, None)))
    except CallerUnknown:
        print("refused")
    naive.victim.kill(); naive.victim.wait()
"""
    assert in_pid_namespace(script, tmp_path / "s") == "refused\nrefused\n"


async def test_a_caller_in_an_inner_pid_namespace_is_attested_as_itself() -> None:
    """Its pid 1 is not the machine's."""
    with Puppet(*unshare("-Urpf", "--mount-proc", "--kill-child")) as puppet:
        assert puppet.ask("os.getpid()") == "1"
        children = Path(f"/proc/{puppet.pid}/task/{puppet.pid}/children").read_text().split()
        attestation = Attestation(build_attestors("unix", {}), 10)
        with closing(LiveProcess.of_pid(int(children[0]))) as process:
            found = await attestation.attest(process, None)
        assert Selector("unix", f"uid:{os.geteuid()}") in found.selectors
        program = Path(sys.executable).resolve()
        assert Selector("unix", f"path:{program}") in found.selectors


async def test_nothing_to_ask_is_still_a_check(me: LiveProcess) -> None:
    assert await Attestation([]).attest(me, None) == Attested(frozenset())
    with Puppet() as puppet, closing(LiveProcess.of_pid(puppet.pid)) as process:
        puppet.kill()
        with pytest.raises(CallerUnknown):
            await Attestation([]).attest(process, None)


# --- plugins ------------------------------------------------------------------------------------

SOURCE = """
from identity_broker.attestors.workload.plugins import WorkloadAttestorPlugin
from identity_broker.domain.selector import Selector


class Rack:
    name = "rack"
    keys = frozenset({"row"})

    def __init__(self, row):
        self.row = row

    async def attest(self, process, *, wanted):
        return frozenset({Selector("rack", f"row:{self.row}")})


class Liar(Rack):
    name = "unix"


PLUGIN = WorkloadAttestorPlugin("rack", lambda table: [Rack(table["row"])])
LIAR = WorkloadAttestorPlugin("liar", lambda table: [Liar(1)])
OTHER_NAME = WorkloadAttestorPlugin("other", lambda table: [])
NOT_A_PLUGIN = object()
"""


def _install(site: Path, package: str, entries: dict[str, str]) -> None:
    info = site / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in entries.items())
    (info / "entry_points.txt").write_text(f"[identity_broker.workload_attestors]\n{lines}")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "idb_rack_workload.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("idb_rack_workload", None)


async def test_another_package_s_attestor_is_found_by_its_name(site: Path, me: LiveProcess) -> None:
    _install(site, "idb_rack", {"rack": "idb_rack_workload:PLUGIN"})
    attestors = (*build_attestors("rack", {"row": 7}), *build_attestors("unix", {}))
    found = await Attestation(attestors).attest(me, {"rack": frozenset({"row"})})
    assert found == Attested(frozenset({Selector("rack", "row:7")}))


@pytest.mark.parametrize(
    ("entries", "name", "message"),
    [
        ({}, "rack", "no installed package offers"),
        ({"rack": "idb_rack_workload:GONE"}, "rack", "cannot be loaded"),
        ({"rack": "idb_gone:PLUGIN"}, "rack", "cannot be loaded"),
        ({"rack": "idb_rack_workload:NOT_A_PLUGIN"}, "rack", "is not a WorkloadAttestorPlugin"),
        ({"rack": "idb_rack_workload:OTHER_NAME"}, "rack", 'calls itself "other"'),
        ({"liar": "idb_rack_workload:LIAR"}, "liar", 'vouches for "unix"'),
        ({"unix": "idb_rack_workload:PLUGIN"}, "unix", "which is built in"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_named(
    site: Path, entries: dict[str, str], name: str, message: str
) -> None:
    _install(site, "idb_rack", entries)
    with pytest.raises(ConfigError, match=message):
        build_attestors(name, {})


def test_two_packages_with_one_name_are_refused(site: Path) -> None:
    _install(site, "idb_rack", {"rack": "idb_rack_workload:PLUGIN"})
    _install(site, "idb_shelf", {"rack": "idb_rack_workload:OTHER_NAME"})
    with pytest.raises(ConfigError, match="several installed packages"):
        build_attestors("rack", {})


@pytest.mark.parametrize(
    ("name", "table", "key"),
    [
        ("unix", {"max_program_bytes": 0}, "max_program_bytes"),
        ("unix", {"max_program_bytes": "hunter2"}, "max_program_bytes"),
        ("unix", {"no_such": 1}, "no_such"),
        ("systemd", {"no_such": 1}, "no_such"),
        ("docker", {"sockets": []}, "sockets"),
        ("docker", {"sockets": 5}, "sockets"),
    ],
)
def test_a_wrong_table_is_a_configuration_error(
    name: str, table: dict[str, object], key: str
) -> None:
    with pytest.raises(ConfigError, match=f'"{name}" cannot be configured: {key}') as refused:
        build_attestors(name, table)
    assert "hunter2" not in str(refused.value)


def test_the_built_in_ones_are_the_entry_points_of_the_package() -> None:
    import tomllib

    from identity_broker.attestors.workload.plugins import BUILT_IN, GROUP

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["entry-points"][GROUP] == BUILT_IN
    for name in BUILT_IN:
        assert {attestor.name for attestor in build_attestors(name, {})} == {name}
