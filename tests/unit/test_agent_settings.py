"""What may stand in an agent's configuration, and what is said of what may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from identity_broker.config.loading import AGENT, known_keys, load_agent
from identity_broker.errors import ConfigError

FINE: dict[str, Any] = {
    "agent.trust_domain": "example.org",
    "broker.address": "broker.example.org:8081",
    "broker.bootstrap_address": "broker.example.org:8082",
    "trust.bundle_url": "https://broker.example.org/bundle",
    "trust.bundle_fingerprints": ["ab" * 32],
    "node.join_token_file": "/run/token",
}


def load(**changes: Any) -> Any:
    """FINE with changes; None takes a key out; "__" stands for a dot."""
    values = {**FINE, **{key.replace("__", "."): value for key, value in changes.items()}}
    return load_agent(None, {k: v for k, v in values.items() if v is not None}, env={})


def problems(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(**changes)
    return "\n".join(caught.value.fields["problems"])


def test_what_is_needed_is_enough() -> None:
    settings = load()
    assert settings.agent.workload_api == Path("/run/identity-broker/workload.sock")
    assert settings.agent.admin_socket == Path("/run/identity-broker/agent.sock")
    assert settings.agent.data_dir is None
    assert load(agent__runtime_dir="/tmp/x").agent.workload_api == Path("/tmp/x/workload.sock")
    own = load(agent__runtime_dir="/tmp/x", agent__workload_api="/tmp/w.sock")
    assert own.agent.workload_api == Path("/tmp/w.sock")
    assert own.agent.admin_socket == Path("/tmp/x/agent.sock")


@pytest.mark.parametrize(
    "written", ["AB" * 32, ":".join(["ab"] * 32), "sha256:" + "ab" * 32, "  " + "ab" * 32]
)
def test_a_fingerprint_may_be_written_as_tools_write_it(written: str) -> None:
    assert load(trust__bundle_fingerprints=[written]).trust.bundle_fingerprints == ("ab" * 32,)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"agent__trust_domain": None}, "agent.trust_domain: required"),
        ({"broker__address": None}, "broker.address: required"),
        ({"broker__address": "127.0.0.1:0"}, "port 0 is nobody's"),
        ({"trust__bundle_url": None}, "set either trust.bundle_file or trust.bundle_url"),
        ({"trust__bundle_fingerprints": None}, "required with trust.bundle_url"),
        ({"trust__insecure_bootstrap": True}, "pointless"),
        ({"trust__bundle_url": "ftp://example.org/"}, "must be a URL"),
        ({"trust__bundle_url": "https://user@example.org/"}, "must be a URL"),
        ({"trust__bundle_fingerprints": ["ab"]}, "64 hexadecimal digits"),
        ({"node__join_token_file": None}, "node.join_token_file: set either"),
        ({"node__cert_file": "/etc/hosts"}, "go together"),
        ({"agent__workload_api": "/" + "x" * 200}, "bytes"),
        ({"agent__admin_socket": "/run/identity-broker/workload.sock"}, "the same as"),
        ({"attestors__deadline": "1"}, "duration"),
        ({"workloads__x509_svids": 0}, "greater than or equal to 1"),
        ({"agent__data_dri": "/x"}, 'did you mean "agent.data_dir"'),
        ({"server__address": "127.0.0.1:1"}, "unknown key"),
    ],
)
def test_what_cannot_be_used_is_said_by_its_key(changes: dict[str, Any], said: str) -> None:
    assert said in problems(**changes)


def test_files_that_are_not_there_are_said(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    told = problems(
        trust__bundle_url=None, trust__bundle_fingerprints=None, trust__bundle_file=missing
    )
    assert "trust.bundle_file: the file cannot be read" in told
    # A token may come later, and be gone after it was used.
    assert load(node__join_token_file=missing).node.join_token_file == Path(missing)


def test_all_problems_come_at_once_and_no_value_is_shown() -> None:
    told = problems(
        agent__trust_domain="Not A Domain", broker__address="nowhere", node__join_token_file=None
    )
    assert len(told.splitlines()) == 3
    assert "Not A Domain" not in told
    assert "nowhere" not in told


def test_a_file_s_paths_are_relative_to_it_and_the_environment_wins(tmp_path: Path) -> None:
    (tmp_path / "root.pem").write_text("x")
    config = tmp_path / "agent.toml"
    config.write_text(
        '[agent]\ntrust_domain = "example.org"\ndata_dir = "data"\n'
        '[broker]\naddress = "a:1"\nbootstrap_address = "a:2"\n'
        '[trust]\nbundle_file = "root.pem"\n[node]\njoin_token_file = "token"\n'
        '[attestors.plugins.docker]\nsocket = "/run/d.sock"\n'
    )
    settings = load_agent(config, None, {"IDB_BROKER__ADDRESS": "b:3"})
    assert settings.agent.data_dir == tmp_path / "data"
    assert settings.trust.bundle_file == tmp_path / "root.pem"
    assert settings.node.join_token_file == tmp_path / "token"
    assert settings.broker.address == "b:3"
    assert settings.attestors.plugins == {"docker": {"socket": "/run/d.sock"}}


def test_every_key_says_what_it_is() -> None:
    keys = set(known_keys(AGENT.root))
    assert {"agent.trust_domain", "trust.bundle_fingerprints", "log.level"} <= keys
    for table, info in AGENT.root.model_fields.items():
        assert info.annotation is not None
        for name, field in info.annotation.model_fields.items():
            assert field.description, f"{table}.{name}"
