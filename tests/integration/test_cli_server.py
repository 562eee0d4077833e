"""`idb server` and a stdout that closes: real processes, no `idb dev` around them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.broker import run_idb


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "broker.toml"
    file.write_text(
        '[server]\ntrust_domain = "example.org"\ndata_dir = "data"\naddress = "127.0.0.1:0"\n'
        'bootstrap_address = "127.0.0.1:0"\nhttp_address = "127.0.0.1:0"\n'
        '[log]\nfile = "broker.log"\n'
    )
    return file


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of `idb`, killed if the test leaves it running."""
    with subprocess.Popen(
        [sys.executable, "-m", "identity_broker.cli.main", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_run_says_where_it_listens_and_drains_on_a_signal(config: Path, tmp_path: Path) -> None:
    assert run_idb("server", "check", "--config", str(config)).code == 0
    assert not (tmp_path / "data").exists()
    with started("server", "run", "--config", str(config), "-o", "json") as process:
        assert process.stdout is not None
        bound = json.loads(process.stdout.readline())
        assert set(bound) == {"address", "bootstrap_address", "http_address", "admin_socket"}
        assert not bound["address"].endswith(":0")
        doctor = run_idb(
            *("--socket", bound["admin_socket"], "doctor", "--http", bound["http_address"]),
            *("--config", str(config), "-o", "json"),
        )
        assert doctor.code == 0, doctor.out
        checked = run_idb("server", "check", "--config", str(config), "-o", "json")
        assert checked.code == 0, checked.err
        assert "store" in checked.json["checked"]
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=15)
    assert (process.returncode, out, err) == (0, "", "")
    assert '"draining"' in (tmp_path / "broker.log").read_text()


def test_a_port_that_is_taken(config: Path, tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run_idb(
            "server", "run", "--config", str(config), "--set", f"server.address={address}"
        )
    assert done.code in (2, 6), done.err
    assert "Traceback" not in done.err


def test_configurations_that_cannot_be_used(config: Path, tmp_path: Path) -> None:
    config.write_text('[server]\ntrust_domain = "example.org"\n[ca]\npasswrod = "s3cr3t"\n')
    for verb in (["server", "run"], ["server", "check"], ["config", "show"], ["doctor"]):
        done = run_idb(*verb, "--config", str(config))
        assert done.code in (2, 6)
        assert "ca.passwrod" in done.err + done.out
        assert "s3cr3t" not in done.err + done.out
    missing = run_idb("server", "run", "--config", str(tmp_path / "none.toml"))
    assert missing.code == 2
    assert "reason: CONFIG_INVALID" in missing.err


def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    with started("version") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(10) == 141


def test_ctrl_c_ends_it_with_130() -> None:
    # A command that waits: for a certificate on a stdin that says nothing.
    with started("svid", "show", "-") as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3.0)
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130
        assert process.stderr is not None
        assert process.stderr.read() == "interrupted\n"
