"""What the SDK is told: settings, environment, attestors, rules, state, exports."""

from __future__ import annotations

import base64
import importlib
import json
import multiprocessing
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from spiffe import SpiffeId

import identity_client
from identity_broker.attestors.node.x509_pop import signed_message
from identity_ca.spiffe_id import TrustDomain as CaTrustDomain
from identity_client import SettingsInvalid, SourceClosed, any_of_trust_domain, below
from identity_client.attestation import CertificateAttestor, JoinTokenAttestor, pop_message
from identity_client.authorization import peer_rule
from identity_client.environment import any_settings_from_env
from identity_client.errors import IdentityNotReady, PeerRejected, ProtocolViolation
from identity_client.peer import Peer, peer_from_der
from identity_client.settings import ENVIRONMENT, settings_from_env
from identity_client.source import IdentitySource
from identity_client.staleness import StalenessPolicy
from identity_client.state_dir import NodeState, StateDir
from identity_client.testing import FakeTrustDomain
from identity_client.workload_api.settings import WorkloadApiSettings

ENV = {
    "IDENTITY_BROKER_ADDRESS": "127.0.0.1:8081",
    "IDENTITY_BROKER_BOOTSTRAP_ADDRESS": "127.0.0.1:8082",
    "IDENTITY_BROKER_BUNDLE_FILE": "/nowhere/bundle.pem",
    "IDENTITY_BROKER_TRUST_DOMAIN": "example.org",
    "IDENTITY_BROKER_JOIN_TOKEN": "idbt_secret-token",
}


# --- settings ----------------------------------------------------------------------------------


def test_the_environment_is_enough() -> None:
    settings = settings_from_env(ENV | {"IDENTITY_BROKER_SPIFFE_ID": "spiffe://example.org/web"})
    assert settings.spiffe_id == SpiffeId("spiffe://example.org/web")
    assert settings.attestor.name == "join_token"
    assert settings.server_name.endswith(".svid.example.org")
    assert set(ENV) <= set(ENVIRONMENT)


def test_all_problems_of_the_environment_are_named_at_once() -> None:
    with pytest.raises(SettingsInvalid) as refused:
        settings_from_env({"IDENTITY_BROKER_CERT_FILE": "x"})
    for name in ("ADDRESS", "BOOTSTRAP_ADDRESS", "BUNDLE_FILE", "TRUST_DOMAIN", "KEY_FILE"):
        assert f"IDENTITY_BROKER_{name}" in refused.value.message


@pytest.mark.parametrize(
    "change",
    [
        {"IDENTITY_BROKER_ADDRESS": "no-port"},
        {"IDENTITY_BROKER_ADDRESS": "h:99999"},
        {"IDENTITY_BROKER_TRUST_DOMAIN": "Example.org"},
        {"IDENTITY_BROKER_TRUST_DOMAIN": "under_score"},
        {"IDENTITY_BROKER_SPIFFE_ID": "spiffe://other.org/web"},
        {"IDENTITY_BROKER_SPIFFE_ID": "spiffe://example.org/../web"},
        {"IDENTITY_BROKER_JOIN_TOKEN_FILE": "/also"},
    ],
)
def test_what_cannot_be_used_is_refused_without_the_token(change: dict[str, str]) -> None:
    with pytest.raises(SettingsInvalid) as refused:
        settings_from_env(ENV | change)
    assert "secret-token" not in str(refused.value)


def test_what_silence_means_is_read_with_either_kind_of_source() -> None:
    name = "IDENTITY_BROKER_REVOCATION_STALENESS"
    assert name in ENVIRONMENT
    assert settings_from_env(ENV).staleness == StalenessPolicy.warn(60)
    assert settings_from_env(ENV | {name: "refuse:5m"}).staleness == StalenessPolicy.refuse(300)
    with pytest.raises(SettingsInvalid) as refused:
        settings_from_env(ENV | {name: "maybe"})
    assert name in refused.value.message
    api = {"SPIFFE_ENDPOINT_SOCKET": "unix:///run/api.sock"}
    found = any_settings_from_env(api | {name: "refuse:90"})
    assert isinstance(found, WorkloadApiSettings)
    assert found.staleness == StalenessPolicy.refuse(90)
    with pytest.raises(SettingsInvalid, match=name):
        any_settings_from_env(api | {name: "refuse"})


def test_the_token_is_in_no_representation() -> None:
    settings = settings_from_env(ENV)
    source = IdentitySource(settings)
    assert "secret-token" not in f"{settings!r} {settings.attestor!r} {source!r}"


def test_bundle_files_that_cannot_be_used(tmp_path: Path) -> None:
    settings = settings_from_env(ENV)
    with pytest.raises(SettingsInvalid, match="cannot be read: No such file"):
        settings.trust_anchors()
    empty = tmp_path / "bundle.pem"
    empty.write_text("nothing")
    with pytest.raises(SettingsInvalid, match="holds no PEM certificate"):
        settings_from_env(ENV | {"IDENTITY_BROKER_BUNDLE_FILE": str(empty)}).trust_anchors()


# --- a source that was not started, or was forked ----------------------------------------------


def test_a_source_that_was_not_started_says_so() -> None:
    source = IdentitySource(settings_from_env(ENV))
    with pytest.raises(IdentityNotReady):
        source.snapshot()
    with pytest.raises(IdentityNotReady):
        source.fetch_jwt_svid("a")
    with pytest.raises(SettingsInvalid):
        source.wait_ready(timeout=1)
    source.close()
    with pytest.raises(IdentityNotReady):
        source.fetch_jwt_svid("a")


def _in_child(source: Any, outcome: Any) -> None:
    try:
        source.snapshot()
        outcome.put("handed out")
    except SourceClosed as error:
        outcome.put(error.reason)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_gets_no_identity() -> None:
    source = FakeTrustDomain().source("spiffe://example.org/web")
    fork = multiprocessing.get_context("fork")
    outcome = fork.SimpleQueue()
    child = fork.Process(target=_in_child, args=(source, outcome))
    child.start()
    child.join(10)
    assert outcome.get() == "SOURCE_FORKED"
    assert source.snapshot().spiffe_id.path == "/web"


# --- attestors ---------------------------------------------------------------------------------


def test_join_token_files_are_read_when_needed(tmp_path: Path) -> None:
    file = tmp_path / "token"
    attestor = JoinTokenAttestor(token_file=file)
    with pytest.raises(SettingsInvalid, match="cannot be read"):
        attestor.payload()
    file.write_text(" \n")
    with pytest.raises(SettingsInvalid, match="holds no token"):
        attestor.payload()
    file.write_text("idbt_one\n")
    assert attestor.payload() == b"idbt_one"
    file.write_text("idbt_two\n")
    assert attestor.payload() == b"idbt_two"
    with pytest.raises(ProtocolViolation):
        attestor.respond(b"", public_key_der=b"", trust_domain="example.org")


@pytest.mark.parametrize("arguments", [{}, {"token": "a", "token_file": "b"}, {"token": ""}])
def test_exactly_one_token_is_needed(arguments: dict[str, str]) -> None:
    with pytest.raises(SettingsInvalid):
        JoinTokenAttestor(**arguments)


def test_both_halves_of_x509_pop_sign_the_same_bytes() -> None:
    ours = pop_message(
        public_key_der=b"key", trust_domain="example.org", nonce=b"n" * 32, client_nonce=b"c" * 32
    )
    theirs = signed_message(b"key", CaTrustDomain.parse("example.org"), b"n" * 32, b"c" * 32)
    assert ours == theirs


def test_certificate_files_that_cannot_be_used(tmp_path: Path) -> None:
    snapshot = FakeTrustDomain().source("spiffe://example.org/machine").snapshot()
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    attestor = CertificateAttestor(cert, key)
    with pytest.raises(SettingsInvalid, match="cannot be read"):
        attestor.payload()
    cert.write_bytes(snapshot.x509.chain_pem)
    key.write_text("-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n")
    with pytest.raises(SettingsInvalid, match="holds no unencrypted") as refused:
        attestor.payload()
    assert "c2VjcmV0" not in str(refused.value)
    assert refused.value.__suppress_context__
    other = ec.generate_private_key(ec.SECP256R1())
    key.write_bytes(
        other.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    with pytest.raises(SettingsInvalid, match="is not that of the first certificate"):
        attestor.payload()
    key.write_bytes(snapshot.x509.key_pem)
    (leaf,) = json.loads(attestor.payload())["certificates"]
    assert peer_from_der(base64.b64decode(leaf)).id == "spiffe://example.org/machine"


@pytest.mark.parametrize(
    "challenge",
    [b"", b"{}", b"[]", b'{"nonce": 1}', b'{"nonce": "AAAA"}', b'{"nonce": "!"}', b"\xff"],
)
def test_challenges_that_cannot_be_read(tmp_path: Path, challenge: bytes) -> None:
    attestor = CertificateAttestor(tmp_path / "c", tmp_path / "k")
    with pytest.raises(ProtocolViolation):
        attestor.respond(challenge, public_key_der=b"", trust_domain="example.org")


# --- rules -------------------------------------------------------------------------------------


def peer(spiffe_id: str) -> Peer:
    parsed = SpiffeId(spiffe_id)
    name = parsed.trust_domain.name
    return Peer(spiffe_id=parsed, id=spiffe_id, trust_domain=name, serial="01", expires_at=0)


@pytest.mark.parametrize(
    ("authorize", "accepted", "refused"),
    [
        ("spiffe://a.org/x", ["spiffe://a.org/x"], ["spiffe://a.org/x/y", "spiffe://b.org/x"]),
        ([], [], ["spiffe://a.org/x"]),
        (
            below("spiffe://a.org/pay"),
            ["spiffe://a.org/pay", "spiffe://a.org/pay/api"],
            ["spiffe://a.org/payments", "spiffe://b.org/pay"],
        ),
        (
            any_of_trust_domain("a.org"),
            ["spiffe://a.org/x"],
            ["spiffe://a.org.evil/x", "spiffe://b.org/x"],
        ),
        (lambda p: p.serial == "01", ["spiffe://a.org/x"], []),
    ],
)
def test_rules(authorize: Any, accepted: list[str], refused: list[str]) -> None:
    rule = peer_rule(authorize)
    assert all(rule(peer(one)) for one in accepted)
    assert not any(rule(peer(one)) for one in refused)


@pytest.mark.parametrize("text", ["web", "spiffe://A.org/x", "spiffe://a.org/x/", ["x"]])
def test_rules_of_things_that_are_no_spiffe_ids(text: Any) -> None:
    with pytest.raises(SettingsInvalid):
        peer_rule(text)
    with pytest.raises(SettingsInvalid):
        below("spiffe://a.org/x/")


def test_an_authority_is_no_peer() -> None:
    domain = FakeTrustDomain()
    (root,) = domain.bundle.x509_authorities
    with pytest.raises(PeerRejected):
        peer_from_der(root.public_bytes(serialization.Encoding.DER))
    with pytest.raises(PeerRejected):
        peer_from_der(b"junk")


# --- state -------------------------------------------------------------------------------------

STATE = NodeState(
    trust_domain="example.org", key_pem=b"key", chain=(b"c",), bundle=b"b", reattestable=True
)


def test_state_round_trips_and_a_failed_write_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = StateDir(tmp_path / "s")
    assert directory.load() is None
    directory.save(STATE)
    assert directory.load() == STATE
    assert "key" not in repr(STATE).replace("key_pem", "")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SettingsInvalid, match="No space left"):
        directory.save(NodeState("other.org", b"k2", (b"c2",), b"b2", reattestable=False))
    monkeypatch.undo()
    assert directory.load() == STATE
    directory.close()
    StateDir(tmp_path / "s").close()


def test_a_state_directory_behind_a_link_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(SettingsInvalid):
            StateDir(tmp_path / name)


# --- the public surface ------------------------------------------------------------------------


def test_the_exports_are_these() -> None:
    assert sorted(identity_client.__all__) == identity_client.__all__
    for module in pkgutil.walk_packages(identity_client.__path__, "identity_client."):
        if "._" in module.name or ".admin" in module.name:
            continue
        loaded = importlib.import_module(module.name)
        assert loaded.__doc__, module.name
        for name in getattr(loaded, "__all__", ()):
            assert hasattr(loaded, name), f"{module.name}.{name}"
    for name in identity_client.__all__:
        assert hasattr(identity_client, name)


def test_the_sdk_imports_neither_broker_nor_ca() -> None:
    program = (
        "import sys, identity_client, identity_client.testing, identity_client.integrations.grpc;"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('identity_broker', 'identity_ca')];"
        "sys.exit(repr(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_sdk_configures_no_logging() -> None:
    program = (
        "import logging, identity_client, identity_client.aio, identity_client.integrations.grpc\n"
        "roots = (logging.getLogger(), logging.getLogger('identity_client'))\n"
        "assert [each.handlers for each in roots] == [[], []]"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
