"""A second machine joined to `idb dev`, as an operator would type it; py-spiffe is the workload."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from spiffe import WorkloadApiClient, X509Source
from spiffe.errors import PySpiffeError

from identity_broker.dev.lifeline import tied_to_parent
from support.agent_process import wait_until
from support.broker import DevBroker, run_idb

SHOWN_ROW = "x509"


def fingerprint_of(broker: DevBroker) -> str:
    """As a person copies it from `idb bundle show`."""
    rows = [line.split() for line in broker.idb("bundle", "show").out.splitlines()]
    (found, *_) = [row[1] for row in rows if row[:1] == [SHOWN_ROW]]
    return found


@pytest.mark.slow
def test_token_agent_entry_and_a_workload_without_any_secret(
    dev_broker: DevBroker, open_directory: Path
) -> None:
    name = dev_broker.unique("machine")
    token_file = open_directory / "token"
    made = dev_broker.idb("token", "generate", "--node", name, "--write", str(token_file))
    assert made.code == 0, made.err
    state = dev_broker.state
    agent = subprocess.Popen(
        [
            *(sys.executable, "-m", "identity_broker.cli.main", "agent", "run", "-o", "json"),
            *("--trust-domain", state.trust_domain),
            *("--broker", state.broker.address),
            *("--bootstrap", state.broker.bootstrap_address),
            *("--bundle-url", f"http://{state.broker.http_address}/bundle"),
            *("--bundle-fingerprint", fingerprint_of(dev_broker)),
            *("--join-token-file", str(token_file)),
            *("--data-dir", str(open_directory / "data")),
            *("--runtime-dir", str(open_directory / "run")),
            *("--set", f"log.file={open_directory / 'agent.log'}"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("IDB_")},
        preexec_fn=tied_to_parent(),  # noqa: PLW1509 - does nothing but prctl
    )
    try:
        assert agent.stdout is not None
        bound = json.loads(agent.stdout.readline())
        env = {"IDB_AGENT_SOCKET": bound["admin_socket"]}
        wait_until(lambda: run_idb("agent", "status", env=env).code == 0)
        with WorkloadApiClient(bound["workload_api"]) as client:
            with pytest.raises(PySpiffeError):
                client.fetch_x509_svid()
            created = dev_broker.idb(
                *("entry", "create", "--spiffe-id", f"/hand/{name}", "--parent", name),
                *("--selector", f"unix:uid:{os.getuid()}", "--wait"),
            )
            assert created.code == 0, created.err
            # The agent has acknowledged it: no retry, no sleep.
            svid = client.fetch_x509_svid()
            assert str(svid.spiffe_id) == f"spiffe://{state.trust_domain}/hand/{name}"
            token = client.fetch_jwt_svid(audience={"somebody"})
            assert client.validate_jwt_svid(token.token, "somebody").spiffe_id == svid.spiffe_id
        source = X509Source(socket_path=bound["workload_api"])
        try:
            serial = source.get_x509_context().default_svid.leaf.serial_number
            revoked = dev_broker.idb("revoke", "--serial", f"{serial:040x}", "--yes")
            assert revoked.code == 0, revoked.err
            wait_until(lambda: source.get_x509_context().default_svid.leaf.serial_number != serial)
        finally:
            source.close()
        explained = run_idb("explain", "--pid", str(os.getpid()), env=env)
        assert explained.code == 0
        assert f"/hand/{name}" in explained.out
    finally:
        agent.terminate()
        code = agent.wait(20)
        if agent.stdout is not None:
            agent.stdout.close()
    log = (open_directory / "agent.log").read_text()
    assert code == 0, log
    assert all(json.loads(line)["event"] for line in log.splitlines())
    assert token.token not in log
