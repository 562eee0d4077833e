"""The embedded OpenBao: resumes, keeps its secrets, ends, and cleans up after a crash."""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from pathlib import Path

import psutil
import pytest
import requests

from identity_broker.dev.openbao import EmbeddedOpenBao
from identity_broker.errors import ConfigError, SigningBackendUnavailable
from identity_ca.backends.vault.auth import TokenAuth
from identity_ca.backends.vault.provision import admin_client, provision
from identity_ca.backends.vault.session import VaultSession, VaultSettings
from identity_ca.backends.vault.transit import TransitKeyManager
from identity_ca.keys import KeyAlgorithm, verify_signature
from support.openbao import TRUST_DOMAIN

pytestmark = pytest.mark.openbao


def test_the_life_of_a_server(tmp_path):
    """One story, because starting costs a second: first start, resume, crash, port taken, end."""
    directory = tmp_path / "bao"
    server = EmbeddedOpenBao(directory)
    try:
        _first_start(server, directory)
        _secrets_are_kept(server, directory)
        key_id = _provision_and_sign(server)
        server.stop()
        _is_gone(server)
        _resumes(EmbeddedOpenBao(directory), server.address, key_id)
        _survives_a_crash(directory, key_id)
        _moves_when_its_port_is_taken(directory)
        _tells_of_a_lost_unseal_key(directory)
    finally:
        server.stop()


def _first_start(server: EmbeddedOpenBao, directory: Path) -> None:
    assert server.start() is server
    assert server.start() is server  # harmless
    assert server.pid is not None
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    connections = psutil.Process(server.pid).net_connections("tcp")
    listening = {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    config = json.loads((directory / "openbao.json").read_text())
    assert list(config["storage"]) == ["raft"]


def _secrets_are_kept(server: EmbeddedOpenBao, directory: Path) -> None:
    secrets = json.loads((directory / "openbao-unseal.json").read_text())
    assert set(secrets) == {"unseal_key", "root_token"}
    process = psutil.Process(server.pid)
    shown = [
        " ".join(process.cmdline()),
        repr(process.environ()),
        server.log_file.read_text(),
        (directory / "openbao.json").read_text(),
        repr(server),
        repr(vars(server).keys()),
    ]
    for secret in secrets.values():
        assert not [text for text in shown if secret in text]
    for file in ("openbao-unseal.json", "root-token", "openbao.log", "openbao.json"):
        assert stat.S_IMODE((directory / file).stat().st_mode) == 0o600
    assert not {name for name in process.environ() if name.startswith(("BAO_", "VAULT_"))}


def _provision_and_sign(server: EmbeddedOpenBao) -> str:
    client = admin_client(server.address, server.root_token)
    provision(client, trust_domain=TRUST_DOMAIN)
    client.adapter.close()
    with _session(server) as session:
        return TransitKeyManager(session).create("x509", KeyAlgorithm.EC_P256).key_id


def _session(server: EmbeddedOpenBao) -> VaultSession:
    return VaultSession(VaultSettings(address=server.address), TokenAuth(server.root_token_file))


def _is_gone(server: EmbeddedOpenBao) -> None:
    assert server.pid is None
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{server.address}/v1/sys/health", timeout=1)
    server.stop()


def _signs(server: EmbeddedOpenBao, key_id: str) -> None:
    with _session(server) as session:
        key = TransitKeyManager(session).load(key_id)
        verify_signature(key.public_key, key.sign(b"again"), b"again")


def _resumes(server: EmbeddedOpenBao, address: str, key_id: str) -> None:
    with server:
        assert server.address == address
        _signs(server, key_id)
        server.seal()
        with pytest.raises(Exception, match="sealed"):
            _signs(server, key_id)
        server.unseal()
        _signs(server, key_id)


def _survives_a_crash(directory: Path, key_id: str) -> None:
    """The tool was killed, and its server lives on: the next start ends it by pid."""
    orphan = EmbeddedOpenBao(directory).start()
    left_behind = orphan.pid
    assert left_behind is not None
    with EmbeddedOpenBao(directory) as server:
        assert server.pid != left_behind
        _signs(server, key_id)
        process = orphan._process
        assert process is not None
        assert process.wait(5) is not None


def _moves_when_its_port_is_taken(directory: Path) -> None:
    before = json.loads((directory / "openbao.json").read_text())
    port = int(before["listener"][0]["tcp"]["address"].rpartition(":")[2])
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(ConfigError, match="is taken"):
            EmbeddedOpenBao(directory, port=port).start()
        with EmbeddedOpenBao(directory) as server:
            assert not server.address.endswith(f":{port}")
            assert server.pid is not None
    # A pid file that names somebody else's process ends nobody.
    (directory / "openbao.pid").write_text(f"{os.getpid()}\n")
    EmbeddedOpenBao(directory)._end_left_behind()


def _tells_of_a_lost_unseal_key(directory: Path) -> None:
    secrets = directory / "openbao-unseal.json"
    kept = secrets.read_text()
    secrets.write_text(kept[:20])
    with pytest.raises(ConfigError, match="unseal key is not there") as refused:
        EmbeddedOpenBao(directory).start()
    assert "empty directory" in refused.value.hint
    assert kept[10:20] not in str(refused.value) + repr(refused.value.__cause__)


def test_a_directory_that_cannot_be_used_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        EmbeddedOpenBao(tmp_path / "file" / "bao").start()


def test_a_server_that_does_not_start_shows_its_log(tmp_path):
    """The storage is damaged: the process ends, and its own words are in the detail."""
    directory = tmp_path / "bao"
    (directory / "raft").mkdir(parents=True)
    (directory / "raft" / "vault.db").write_bytes(b"not a database" * 1000)
    began = time.monotonic()
    server = EmbeddedOpenBao(directory)
    with pytest.raises(SigningBackendUnavailable, match="did not") as refused:
        server.start()
    assert time.monotonic() - began < 10
    assert str(directory / "openbao.log") in refused.value.hint
    assert "exit code" in refused.value.detail
    assert server.pid is None
