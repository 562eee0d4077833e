"""`idb svid fetch` over a Workload API: files, hooks, rotation, failures."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from identity_api.broker.v1 import types_pb2
from identity_broker.cli.errors import UsageRefused
from identity_broker.cli.options import Invocation
from identity_broker.cli.svid import _asking
from identity_broker.cli.svid_fetch import parse_hook
from identity_broker.dev.state import AgentAddresses, BrokerAddresses, DevState
from identity_client import SettingsInvalid
from identity_client.keys import spki_der
from support.line import running, settings_in
from support.svid_watch import fetch_once, watching
from support.workload_server import ScriptedDomain, ScriptedWorkloadApi, serving

FOLDER = "credential-bundle.private-key.pem"


@pytest.fixture
def domain() -> ScriptedDomain:
    return ScriptedDomain("example.org")


@pytest.fixture
async def api(domain: ScriptedDomain, tmp_path: Path) -> AsyncIterator[ScriptedWorkloadApi]:
    scripted = ScriptedWorkloadApi(domain)
    async with serving(scripted, tmp_path / "api.sock"):
        yield scripted


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"unix://{tmp_path / 'api.sock'}"


def serial_in(path: Path) -> str:
    return f"{x509.load_pem_x509_certificate(path.read_bytes()).serial_number:040x}"


def fits(bundle: bytes) -> bool:
    """Whether key and leaf of one credential bundle belong together."""
    key = load_pem_private_key(bundle, password=None)
    return spki_der(x509.load_pem_x509_certificate(bundle).public_key()) == spki_der(
        key.public_key()
    )


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- once --------------------------------------------------------------------------------------


async def test_files_for_everybody_who_reads_files(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, address: str, tmp_path: Path
) -> None:
    web, partner = domain.svid("/web"), ScriptedDomain("partner.org")
    revoked = domain.svid("/gone").serial
    await api.say(
        domain.offer(web),
        crls=[domain.crl([revoked])],
        federated={"spiffe://partner.org": partner.bundle_der()},
    )
    out = tmp_path / "svids"
    code, stdout, talk = await fetch_once(
        "--workload-api", address, "--write", str(out), "-o", "json"
    )
    assert code == 0, talk
    document = json.loads(stdout)
    assert (document["spiffe_id"], document["serial"]) == (str(web.spiffe_id), web.serial)
    assert document["files"]["key"] == str(out / "key.pem")
    assert "PRIVATE KEY" not in stdout + talk
    assert mode_of(out) == 0o700
    assert {path.name: mode_of(path) for path in out.iterdir() if path.is_file()} == {
        "svid.pem": 0o644,
        "key.pem": 0o600,
        "bundle.pem": 0o644,
        "crl.pem": 0o644,
        FOLDER: 0o600,
        "example.org.spiffe-trust-bundle.pem": 0o644,
        "partner.org.spiffe-trust-bundle.pem": 0o644,
    }
    assert serial_in(out / "svid.pem") == web.serial
    assert (out / FOLDER).read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert fits((out / FOLDER).read_bytes())
    assert fits((out / "svid.pem").read_bytes() + (out / "key.pem").read_bytes())
    (listed,) = x509.load_pem_x509_crl((out / "crl.pem").read_bytes())
    assert f"{listed.serial_number:040x}" == revoked
    partner_anchor = x509.load_pem_x509_certificate(
        (out / "partner.org.spiffe-trust-bundle.pem").read_bytes()
    )
    assert partner_anchor == partner.bundle.x509_authorities[0]
    assert len(list(out.glob(".generation-*"))) == 1


async def test_regular_files_of_before_are_replaced_and_those_of_others_stay(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, address: str, tmp_path: Path
) -> None:
    web = domain.svid("/web")
    await api.say(domain.offer(web), crls=[domain.crl()])
    (tmp_path / "svid.pem").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    arguments = ("--workload-api", address, "--write", str(tmp_path))
    code, stdout, talk = await fetch_once(*arguments)
    assert code == 0, talk
    assert str(tmp_path / "crl.pem") in stdout.splitlines()
    assert serial_in(tmp_path / "svid.pem") == web.serial
    # A list that is sent no more leaves no file behind.
    await api.say(domain.offer(web))
    assert (await fetch_once(*arguments))[0] == 0
    assert not (tmp_path / "crl.pem").is_symlink()
    assert (tmp_path / "notes.txt").read_text() == "mine"


async def test_where_the_agent_is_found(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, address: str, tmp_path: Path
) -> None:
    await api.say(domain.offer(domain.svid("/a")), domain.offer(domain.svid("/b"), hint="b"))
    dev_state(tmp_path, "dev", address)
    env = {"SPIFFE_ENDPOINT_SOCKET": address}
    wrong = {"SPIFFE_ENDPOINT_SOCKET": "unix:///none"}
    for arguments, environment, expected in (
        (["--hint", "b"], env, "b"),
        (["--dir", str(tmp_path / "dev"), "--spiffe-id", "/b"], wrong, "b"),
    ):
        code, stdout, talk = await fetch_once(*arguments, env=environment, cwd=tmp_path)
        assert (code, stdout) == (0, f"spiffe://example.org/{expected}\n"), (arguments, talk)


def dev_state(directory: Path, name: str, workload_api: str) -> Path:
    """A dev.json, with an agent where an address is given."""
    (directory / name).mkdir()
    DevState(
        trust_domain="example.org",
        broker=BrokerAddresses("127.0.0.1:1", "127.0.0.1:2", "/none", "127.0.0.1:3"),
        openbao_address="",
        bundle_file="/none",
        pid=1,
        workload_api=workload_api,
        agent=AgentAddresses("/none", "spiffe://example.org/n") if workload_api else None,
    ).write(directory / name)
    return directory / name


def test_which_address_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--workload-api, then --dir, then the environment, then ./.dev."""
    monkeypatch.chdir(tmp_path)
    for name in ("IDB_DIR", "SPIFFE_ENDPOINT_SOCKET"):
        monkeypatch.delenv(name, raising=False)
    dev = dev_state(tmp_path, "dev", "unix:///dev")
    none = dev_state(tmp_path, "none", "")

    def found(option: str | None = None, dir: Path | None = None) -> str:
        return _asking(Invocation(dir=dir), option, None, None, None).endpoint.uri

    assert found("unix:///a", dev) == "unix:///a"
    assert found("unix:/a") == "unix:/a"
    assert found("my run/api.sock") == f"unix://{tmp_path}/my%20run/api.sock"
    with pytest.raises(SettingsInvalid):
        found("http://127.0.0.1:80")
    assert found(dir=dev) == "unix:///dev"
    for nothing in (None, none):
        with pytest.raises(UsageRefused):
            found(dir=nothing)
    dev_state(tmp_path, ".dev", "unix:///here")
    assert found() == "unix:///here"
    monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", "unix:///env")
    assert found() == "unix:///env"
    assert found(dir=dev) == "unix:///dev"
    with pytest.raises(UsageRefused):  # It was named, and it has no agent: no other will do.
        found(dir=none)
    monkeypatch.delenv("SPIFFE_ENDPOINT_SOCKET")
    monkeypatch.setenv("IDB_DIR", str(dev))
    assert found() == "unix:///dev"
    whole = _asking(Invocation(), None, "/b", None, None)
    assert str(whole.spiffe_id) == "spiffe://example.org/b"
    with pytest.raises(UsageRefused):
        _asking(Invocation(), "unix:///a", "/b", None, None)
    with pytest.raises(UsageRefused):
        _asking(Invocation(address="127.0.0.1:1"), None, None, None, None)


@pytest.mark.parametrize("command", ["true", "", "'", "no-such-program --now"])
def test_hooks_that_cannot_be(command: str, tmp_path: Path) -> None:
    with pytest.raises(UsageRefused):
        parse_hook(command, write=None if command == "true" else tmp_path)


def test_a_hook_s_words() -> None:
    assert parse_hook("sh -c 'a b'  \"c d\"", write=Path()) == ("sh", "-c", "a b", "c d")
    assert parse_hook(None, write=None) == ()


async def test_no_identity_and_no_agent(
    api: ScriptedWorkloadApi, address: str, tmp_path: Path
) -> None:
    await api.fail(grpc.StatusCode.PERMISSION_DENIED)
    wait = ("--timeout", "0.5")
    code, _, talk = await fetch_once("--workload-api", address, *wait)
    assert (code, "reason: NO_IDENTITY" in talk) == (6, True), talk
    assert "idb explain --pid" in talk
    code, _, talk = await fetch_once("--workload-api", f"unix://{tmp_path}/none.sock", *wait)
    assert (code, "reason: WORKLOAD_API_UNREACHABLE" in talk) == (6, True), talk
    await api.fail(grpc.StatusCode.INVALID_ARGUMENT, "no")
    code, _, talk = await fetch_once("--workload-api", address)
    assert code == 2, talk


async def test_a_directory_that_cannot_be_used(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, address: str, tmp_path: Path
) -> None:
    await api.say(domain.offer(domain.svid("/web")))
    (tmp_path / "file").write_text("")
    code, _, talk = await fetch_once("--workload-api", address, "--write", str(tmp_path / "file"))
    assert (code, "reason: FILE_UNREADABLE" in talk) == (2, True), talk


async def test_a_failing_hook_fails_the_command(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, address: str, tmp_path: Path
) -> None:
    await api.say(domain.offer(domain.svid("/web")))
    out = str(tmp_path / "svids")
    arguments = ("--workload-api", address, "--write", out, "--exec")
    code, stdout, talk = await fetch_once(*arguments, "sh -c 'echo loud; exit 3'", "-o", "json")
    assert (code, "reason: HOOK_FAILED" in talk or "HOOK_FAILED" in talk) == (6, True), talk
    assert json.loads(stdout)["exec_exit_code"] == 3
    assert "loud" in talk
    assert "loud" not in stdout


# --- following ---------------------------------------------------------------------------------


async def test_rotations_are_followed_and_readers_never_see_a_mixture(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, address: str, tmp_path: Path
) -> None:
    out = tmp_path / "svids"
    # The hook sees the whole new generation, and can be slow.
    log = tmp_path / "hook.log"
    hook = f"sh -c 'openssl x509 -in {out}/svid.pem -noout -serial >> {log}'"
    first = domain.svid("/web")
    await api.say(domain.offer(first))
    seen = 0
    async with watching("--workload-api", address, "--write", str(out), "--exec", hook) as watch:
        assert (await watch.document(1))["serial"] == first.serial
        assert watch.documents[0]["exec_exit_code"] == 0

        async def read_all_the_time() -> None:
            nonlocal seen
            while True:
                assert fits((out / FOLDER).read_bytes())
                seen += 1
                await asyncio.sleep(0)

        reader = asyncio.create_task(read_all_the_time())
        issued, material = [first.serial], first
        for number in range(2, 12):
            material = domain.svid("/web")
            issued.append(material.serial)
            await api.say(domain.offer(material))
            await watch.document(number)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert [one["serial"] for one in watch.documents] == issued
        logged = [line.partition("=")[2].lower() for line in log.read_text().splitlines()]
        assert logged == issued
        assert len(list(out.glob(".generation-*"))) == 1
        assert mode_of(out / "key.pem") == 0o600
        # The same state again is no rotation.
        await api.say(domain.offer(material))
        await asyncio.sleep(0.3)
        assert len(watch.documents) == 11
        assert await watch.stop() == 0
    assert seen > 20
    assert serial_in(out / "svid.pem") == issued[-1]


async def test_a_new_revocation_list_alone_is_written_and_told(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, address: str, tmp_path: Path
) -> None:
    out = tmp_path / "svids"
    offer = domain.offer(domain.svid("/web"))
    await api.say(offer, crls=[domain.crl()])
    async with watching("--workload-api", address, "--write", str(out)) as watch:
        first = await watch.document(1)
        await api.say(offer, crls=[domain.crl([domain.svid("/gone").serial])])
        assert (await watch.document(2))["serial"] == first["serial"]
        assert len(list(x509.load_pem_x509_crl((out / "crl.pem").read_bytes()))) == 1


async def test_a_hook_that_fails_does_not_end_the_watch(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, address: str, tmp_path: Path
) -> None:
    flag = tmp_path / "broken"
    flag.touch()
    hook = f"sh -c '! test -e {flag}'"
    await api.say(domain.offer(domain.svid("/web")))
    out = str(tmp_path / "svids")
    async with watching("--workload-api", address, "--write", out, "--exec", hook) as watch:
        assert (await watch.document(1))["exec_exit_code"] == 1
        await watch.until(lambda: "HOOK_FAILED" in watch.talk or "exit code 1" in watch.talk)
        flag.unlink()
        await api.say(domain.offer(domain.svid("/web")))
        assert (await watch.document(2))["exec_exit_code"] == 0


async def test_a_withdrawn_identity_is_told_and_followed_again(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, address: str, tmp_path: Path
) -> None:
    out = tmp_path / "svids"
    await api.fail(grpc.StatusCode.PERMISSION_DENIED)
    async with watching("--workload-api", address, "--write", str(out)) as watch:
        # There is no limit to how long it waits for the first one.
        await watch.until(lambda: "NO_IDENTITY" in watch.talk)
        web = domain.svid("/web")
        await api.say(domain.offer(web))
        await watch.document(1)
        await api.fail(grpc.StatusCode.PERMISSION_DENIED)
        await watch.until(lambda: "withdrawn" in watch.talk)
        # What others read is theirs until it expires; it is not taken from under them.
        assert serial_in(out / "svid.pem") == web.serial
        again = domain.svid("/web")
        await api.say(domain.offer(again))
        assert (await watch.document(2))["serial"] == again.serial
        assert await watch.stop(signal.SIGINT) == 0


async def test_an_agent_that_will_never_answer_ends_the_watch(
    api: ScriptedWorkloadApi, address: str
) -> None:
    await api.fail(grpc.StatusCode.UNIMPLEMENTED)
    async with watching("--workload-api", address) as watch:
        async with asyncio.timeout(20):
            assert await watch.process.wait() == 2


async def test_a_full_disk_is_waited_out(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, address: str, tmp_path: Path
) -> None:
    """No file may grow beyond 64 bytes: to the writer, that is a disk that is full."""
    out = tmp_path / "svids"
    await api.say(domain.offer(domain.svid("/web")))
    async with watching("--workload-api", address, "--write", str(out)) as watch:
        before = (await watch.document(1))["serial"]
        pid, unlimited = watch.process.pid, resource.RLIM_INFINITY
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (64, unlimited))
        await api.say(domain.offer(domain.svid("/web")))
        await watch.until(lambda: "trying again" in watch.talk)
        assert serial_in(out / "svid.pem") == before
        assert fits((out / FOLDER).read_bytes())
        assert len(list(out.glob(".generation-*"))) == 1
        newest = domain.svid("/web")
        await api.say(domain.offer(newest))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
        assert (await watch.document(2))["serial"] == newest.serial


async def test_a_node_of_its_own_can_be_followed_too(tmp_path: Path) -> None:
    """With a join token, as ever; --watch and --write are the same."""
    out = tmp_path / "svids"
    async with running(settings_in(tmp_path / "idb", ca={"key_manager": "memory"})) as broker:
        selector = types_pb2.Selector(type="join_token", value="name:n1")
        await broker.entry("/web", "n1", selectors=[selector], x509_ttl_seconds=10)
        (tmp_path / "token").write_text(await broker.token("n1"))
        async with watching(
            *("--address", broker.addresses.address),
            *("--bootstrap-address", broker.addresses.bootstrap_address),
            *("--trust-domain", "example.org", "--bundle", str(broker.settings.server.bundle_file)),
            *("--token-file", str(tmp_path / "token"), "--spiffe-id", "/web"),
            *("--write", str(out)),
        ) as watch:
            first, second = await watch.document(1), await watch.document(2)
    assert first["spiffe_id"] == "spiffe://example.org/web"
    assert first["serial"] != second["serial"] == serial_in(out / "svid.pem")
    assert not (out / "crl.pem").exists()


async def test_one_writer_to_a_directory(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, address: str, tmp_path: Path
) -> None:
    await api.say(domain.offer(domain.svid("/web")))
    arguments = ("--workload-api", address, "--write", str(tmp_path / "svids"))
    async with watching(*arguments) as watch:
        await watch.document(1)
        code, _, talk = await fetch_once(*arguments)
        assert (code, "another process writes" in talk) == (2, True), talk
    assert (await fetch_once(*arguments))[0] == 0


async def test_a_crash_leaves_whole_files_and_the_next_run_tidies_up(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, address: str, tmp_path: Path
) -> None:
    out = tmp_path / "svids"
    web = domain.svid("/web")
    await api.say(domain.offer(web))
    # It is killed by its own hook: after the swap, before the old generation was removed.
    hook = f'{sys.executable} -c "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"'
    arguments = ("--workload-api", address, "--write", str(out))
    for number in (1, 2):
        code, *_ = await fetch_once(*arguments, "--exec", hook)
        assert code == -signal.SIGKILL
        assert len(list(out.glob(".generation-*"))) == number
    (out / ".generation-torn").mkdir()
    assert serial_in(out / "svid.pem") == web.serial
    assert fits((out / FOLDER).read_bytes())
    assert (await fetch_once(*arguments))[0] == 0
    assert [path.name for path in out.glob(".generation-*")] == [str((out / ".current").readlink())]
