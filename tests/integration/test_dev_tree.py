"""`idb dev`: one tree of processes that starts, resumes, says what happened, and ends whole."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from identity_broker.dev.state import FILE_NAME
from support.broker import DevBroker, run_dev, run_idb

LOCAL = ("--ca", "local")


def children(pid: int) -> dict[int, str]:
    """The command lines of the direct children of a process."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found[int(child)] = (
                Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            )
    return found


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def all_gone(pids: list[int], seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(map(is_running, pids)):
            return True
        time.sleep(0.05)
    return False


def identities(broker: DevBroker) -> dict[str, object]:
    authorities = broker.admin.authorities.list()
    return {
        "authorities": {one.id for one in authorities if one.state == "active"},
        "roots": broker.admin.bundle().x509_authorities,
        "entries": [one.id for one in broker.admin.entries.list()],
        "trust_domain": broker.state.trust_domain,
    }


def make_entry(broker: DevBroker) -> None:
    made = broker.idb(
        *("entry", "create", "--id", "kept", "--spiffe-id", "/kept", "--parent", "n"),
        *("--selector", "unix:uid:1"),
    )
    assert made.code == 0, made.err


def assert_others_reach_the_workload_api_alone(directory: Path, workload_api: str) -> None:
    """Every user may pass through; nothing else is readable, nor can be listed."""
    socket_path = Path(workload_api.removeprefix("unix://"))
    assert stat.S_IMODE(socket_path.stat().st_mode) == 0o666
    assert stat.S_IMODE(directory.stat().st_mode) == 0o711
    for path in directory.iterdir():
        mode = stat.S_IMODE(path.stat().st_mode)
        assert path == socket_path.parent or not mode & 0o077, f"{path.name} is open: {mode:o}"


def test_the_agent_is_a_node_again_without_a_new_token(tmp_path: Path) -> None:
    directory = tmp_path / "dev"
    with run_dev(directory, *LOCAL) as broker:
        made = broker.idb(
            *("entry", "create", "--id", "mine", "--spiffe-id", "/mine"),
            *("--selector", f"unix:uid:{os.getuid()}", "--wait"),
        )
        assert made.code == 0, made.err
        fetched = broker.idb("svid", "fetch", "-o", "json")
        assert fetched.code == 0, fetched.err
        assert fetched.json["spiffe_id"] == "spiffe://dev.example.org/mine"
        before = (directory / "agent.token").read_text()
    with run_dev(directory, *LOCAL) as broker:
        assert (directory / "agent.token").read_text() != before
        assert broker.idb("svid", "fetch", "-o", "json").json["spiffe_id"].endswith("/mine")
        log = (directory / "agent.log").read_text()
        assert log.count("node attested") == 1, "the second start spent a token"


@pytest.mark.openbao
@pytest.mark.slow
def test_a_real_openbao_and_a_second_start_that_resumes(tmp_path: Path) -> None:
    directory = tmp_path / "dev"
    with run_dev(directory) as broker:
        document = json.loads((directory / FILE_NAME).read_text())
        assert set(document) == {
            *("trust_domain", "broker", "openbao", "bundle_file", "pid", "workload_api", "agent")
        }
        assert document["agent"]["node_id"].endswith("/idb/node/join_token/dev-agent")
        assert set(document["broker"]) == {
            *("address", "bootstrap_address", "admin_socket", "http_address")
        }
        assert document["pid"] == broker.process.pid
        assert document["openbao"]["address"].startswith("http://127.0.0.1:")
        assert "BEGIN CERTIFICATE" in Path(document["bundle_file"]).read_text()
        assert_others_reach_the_workload_api_alone(directory, document["workload_api"])
        assert stat.S_IMODE((directory / FILE_NAME).stat().st_mode) == 0o600
        tree = children(broker.process.pid)
        assert len(tree) == 3
        make_entry(broker)
        before = identities(broker)
        authority = next(iter(broker.admin.authorities.list()))
        assert authority.key_id.startswith("transit:")
        assert authority.upstream == "vault_pki"
        doctor = broker.idb("doctor", "-o", "json")
        assert doctor.code == 0, doctor.out
        addresses = broker.state.broker
        started = time.monotonic()
        assert broker.stop() == 0
        assert time.monotonic() - started < 10
        assert not (directory / FILE_NAME).exists()
        assert all_gone(list(tree))
    with run_dev(directory) as broker:
        assert identities(broker) == before
        assert broker.state.broker == addresses
        # OpenBao ends by itself: dev says so and takes the broker with it.
        tree = children(broker.process.pid)
        (bao,) = (pid for pid, command in tree.items() if "server -config=" in command)
        os.kill(bao, signal.SIGKILL)
        assert broker.process.wait(15) == 6
        assert "OpenBao ended" in broker.out.read_text()
        assert all_gone(list(tree))
        assert not (directory / FILE_NAME).exists()


def test_a_second_dev_conflicts_and_harms_nothing(dev_broker: DevBroker) -> None:
    second = run_idb("dev", "--dir", str(dev_broker.directory), *LOCAL, "-o", "json")
    assert second.code == 5
    assert second.error["reason"] == "DEV_ALREADY_RUNNING"
    assert str(dev_broker.process.pid) in second.error["message"]
    assert dev_broker.idb("doctor").code == 0
    assert (dev_broker.directory / FILE_NAME).exists()


@pytest.mark.parametrize(("part", "title"), [("server", "broker"), ("agent", "agent")])
def test_a_killed_part_ends_the_tree_and_the_next_start_resumes(
    part: str, title: str, tmp_path: Path
) -> None:
    directory = tmp_path / "dev"
    with run_dev(directory, *LOCAL, "--trust-domain", "kill.example") as broker:
        make_entry(broker)
        before = identities(broker)
        tree = children(broker.process.pid)
        (pid,) = (pid for pid, command in tree.items() if f"{part} run" in command)
        os.kill(pid, signal.SIGKILL)
        assert broker.process.wait(10) == 6
        said = broker.out.read_text()
        assert f"the {title} ended with signal 9" in said
        assert all_gone(list(tree))
        assert "DEV_CHILD_ENDED" in said
        assert not (directory / FILE_NAME).exists()
    # Nothing runs, and the CLI says how to start it.
    down = run_idb("--dir", str(directory), "entry", "list", "-o", "json")
    assert down.code == 6
    assert "idb dev" in down.error["hint"]
    # kill -9 of the whole tree's root leaves no orphan, and its directory can be used again.
    with run_dev(directory) as broker:
        assert identities(broker) == before
        assert broker.state.trust_domain == "kill.example"
        pids = list(children(broker.process.pid))
        broker.stop(signal.SIGKILL)
        assert all_gone(pids)
        assert (directory / FILE_NAME).exists()  # stale: nobody was left to remove it
        down = run_idb("--dir", str(directory), "entry", "list")
        assert down.code == 6
    refused = run_idb("dev", "--dir", str(directory), "--trust-domain", "other.example")
    assert refused.code == 2
    assert "reason: DEV_DIRECTORY_UNUSABLE" in refused.err
    assert run_idb("dev", "--dir", str(directory), "--ca", "openbao").code == 2


def test_a_directory_too_deep_for_a_socket(tmp_path: Path) -> None:
    directory = tmp_path / ("deep" * 20) / ("deeper" * 10) / "dev"
    with run_dev(directory, *LOCAL) as broker:
        socket = Path(broker.state.broker.admin_socket)
        assert not socket.is_relative_to(directory)
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        workload_api = Path(broker.state.workload_api.removeprefix("unix://"))
        assert stat.S_IMODE(workload_api.stat().st_mode) == 0o666
        assert workload_api.is_relative_to(socket.parent.parent)
        assert broker.idb("authority", "list").code == 0
        assert broker.stop(signal.SIGINT) == 0
        assert not socket.parent.exists()


@pytest.mark.parametrize("kind", ["file", "foreign", "damaged"])
def test_directories_that_cannot_be_used(tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "dev"
    if kind == "file":
        directory.touch()
    else:
        directory.mkdir()
        name = {"foreign": "thesis.tex", "damaged": "settings.json"}[kind]
        (directory / name).write_text("{}")
    refused = run_idb("dev", "--dir", str(directory), *LOCAL)
    assert refused.code == 2
    assert "reason: DEV_DIRECTORY_UNUSABLE" in refused.err
    assert not (directory / FILE_NAME).exists()


def test_a_configuration_the_broker_refuses_is_told_in_words(tmp_path: Path) -> None:
    refused = run_idb("dev", "--dir", str(tmp_path / "dev"), *LOCAL, "--trust-domain", "Not Valid")
    assert refused.code == 6
    assert "trust_domain" in refused.err
    assert "Traceback" not in refused.err


def test_a_port_taken_at_the_last_moment_is_given_up(tmp_path: Path) -> None:
    directory = tmp_path / "dev"
    with run_dev(directory, *LOCAL) as broker:
        before = broker.state.broker
    host, _, port = before.address.rpartition(":")
    # The look before the start is left out: what it saw free may be taken when the broker binds.
    script = (
        "import identity_broker.dev.directory as d\n"
        "d._if_free = lambda address: address\n"
        "from identity_broker.cli.main import main\n"
        "main()\n"
    )
    with socket.socket() as taken:
        taken.bind((host, int(port)))
        taken.listen()
        process = subprocess.Popen(
            [sys.executable, "-c", script, "dev", "--dir", str(directory)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + 40
            while not (directory / FILE_NAME).exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            after = json.loads((directory / FILE_NAME).read_text())["broker"]["address"]
            assert after != before.address
        finally:
            process.terminate()
            assert process.wait(15) == 0
