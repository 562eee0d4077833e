"""`idb envoy config`: what it prints, what it refuses, and the files kept in deploy/envoy/.

That a real Envoy takes it is shown in test_envoy_proxies.py and test_envoy_mesh.py.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from identity_broker.cli.envoy_bootstrap import Address, authorities_for
from identity_broker.cli.errors import UsageRefused
from identity_broker.cli.main import cli
from identity_broker.cli.options import Invocation
from identity_broker.cli.yaml_text import to_yaml
from support import repository

DEPLOY = repository.ROOT / "deploy" / "envoy"
SOCKET = ("--workload-api", "unix:///run/api.sock")
INBOUND = ("--inbound", "0.0.0.0:8443", "--app", "127.0.0.1:8080")
OUTBOUND = ("--outbound", "127.0.0.1:9001", "--peer", "stock.internal:8443")
ORDERS = "spiffe://example.org/shop/orders"
STOCK = "spiffe://example.org/shop/stock"


def run(*arguments: str, env: dict[str, str | None] | None = None) -> Result:
    environment = {"SPIFFE_ENDPOINT_SOCKET": None, "IDB_DIR": None, **(env or {})}
    return CliRunner().invoke(
        cli, ["envoy", "config", *arguments], obj=Invocation(), env=environment
    )


def printed(*arguments: str, env: dict[str, str | None] | None = None) -> Any:
    done = run(*arguments, "-o", "json", env=env)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def refused(*arguments: str, env: dict[str, str | None] | None = None) -> str:
    done = run(*arguments, env=env)
    assert isinstance(done.exception, UsageRefused), done.output
    return done.exception.public


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No `idb dev` of a developer is found in ./.dev."""
    monkeypatch.chdir(tmp_path)


def contexts(document: Any) -> list[Any]:
    """Every TLS context, the inbound listener's first."""
    resources = document["static_resources"]
    chains = [chain for listener in resources["listeners"] for chain in listener["filter_chains"]]
    return [
        each["transport_socket"]["typed_config"]
        for each in (*chains, *resources["clusters"])
        if "transport_socket" in each
    ]


def peers(context: Any) -> list[str]:
    combined = context["common_tls_context"]["combined_validation_context"]
    matchers = combined["default_validation_context"]["match_typed_subject_alt_names"]
    assert {matcher["san_type"] for matcher in matchers} == {"URI"}
    return [matcher["matcher"]["exact"] for matcher in matchers]


def secrets(context: Any) -> list[str]:
    common = context["common_tls_context"]
    (certificate,) = common["tls_certificate_sds_secret_configs"]
    validation = common["combined_validation_context"]["validation_context_sds_secret_config"]
    return [certificate["name"], validation["name"]]


@pytest.mark.parametrize("name", ["orders", "stock"])
def test_the_kept_files_are_what_the_readme_types(name: str) -> None:
    """Write them again: the commands are in deploy/envoy/README.md."""
    (block,) = re.findall(r"```sh\n(.*?)```", (DEPLOY / "README.md").read_text(), re.DOTALL)
    commands = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    (command,) = [words for words in commands if words[-1] == f"{name}.yaml"]
    assert command[:3] == ["idb", "envoy", "config"]
    done = run(*command[3:-2])
    assert done.exit_code == 0
    assert done.stdout == (DEPLOY / f"{name}.yaml").read_text()


def test_inbound_asks_for_certificates_of_the_peers_named() -> None:
    document = printed("stock", *INBOUND, "--accept", ORDERS, "--accept", STOCK, *SOCKET)
    (context,) = contexts(document)
    assert context["require_client_certificate"] is True
    assert peers(context) == [ORDERS, STOCK]
    assert secrets(context) == ["default", "spiffe://example.org"]


def test_outbound_expects_the_peer_named() -> None:
    document = printed("orders", *OUTBOUND, "--expect", STOCK, "--spiffe-id", ORDERS, *SOCKET)
    (context,) = contexts(document)
    assert peers(context) == [STOCK]
    assert secrets(context) == [ORDERS, "spiffe://example.org"]


def test_both_directions_fit_in_one_envoy() -> None:
    document = printed("shop", *INBOUND, "--accept", ORDERS, *OUTBOUND, "--expect", STOCK, *SOCKET)
    assert [peers(context) for context in contexts(document)] == [[ORDERS], [STOCK]]


def test_peers_of_two_trust_domains_need_the_authorities_of_both() -> None:
    partner = "spiffe://partner.test/shop"
    document = printed("stock", *INBOUND, "--accept", ORDERS, "--accept", partner, *SOCKET)
    (context,) = contexts(document)
    assert secrets(context) == ["default", "ALL"]
    assert authorities_for((partner,)) == "spiffe://partner.test"
    assert "own trust domain" in refused(
        "stock", *INBOUND, "--accept", ORDERS, "--accept", partner, *SOCKET, "--check-revocation"
    )


def test_revocation_is_asked_for_in_the_nodes_metadata() -> None:
    arguments = ("stock", *INBOUND, "--accept", ORDERS, *SOCKET)
    assert "metadata" not in printed(*arguments)["node"]
    asked = printed(*arguments, "--check-revocation")["node"]["metadata"]
    assert asked == {"certificate_revocation_lists": True}


def test_nothing_secret_and_no_admin_interface_unless_asked_for() -> None:
    arguments = ("stock", *INBOUND, "--accept", ORDERS, *SOCKET)
    done = run(*arguments)
    assert "BEGIN" not in done.stdout
    assert done.stderr == ""
    assert "admin" not in printed(*arguments)
    assert "admin" in printed(*arguments, "--admin", "127.0.0.1:9901")


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        ((*OUTBOUND[:1], "0.0.0.0:9001", *OUTBOUND[2:], "--expect", STOCK), "speaks as this"),
        ((*INBOUND[:3], "192.0.2.1:80", "--accept", ORDERS), "without TLS"),
        ((*INBOUND, "--accept", ORDERS, "--admin", "0.0.0.0:9901"), "stop and read"),
    ],
)
def test_what_lets_others_in_is_warned_of(arguments: tuple[str, ...], about: str) -> None:
    done = run("stock", *arguments, *SOCKET)
    assert done.exit_code == 0
    assert about in done.stderr
    assert "warning" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        ((), "does nothing"),
        (INBOUND, "--accept must be given"),
        (("--accept", ORDERS), "--inbound and --app must"),
        (OUTBOUND, "--expect must be given"),
        ((*INBOUND, "--accept", "orders"), '"orders"'),
        ((*INBOUND, "--accept", "spiffe://Example.org/orders"), "Example.org"),
        ((*INBOUND, "--accept", "spiffe://example.org/a/../b"), "no segment"),
        ((*INBOUND, "--accept", "/shop/orders"), "no --dir says the trust domain"),
    ],
)
def test_what_cannot_work_is_refused(arguments: tuple[str, ...], about: str) -> None:
    assert about in refused("stock", *arguments, *SOCKET)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.0.0.1:", ":8443", "::1:8443", "host:99999", "host:-1", "host:\uff11"],
)
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    done = run("stock", "--inbound", address)
    assert done.exit_code != 0
    assert "HOST:PORT" in str(done.exception) + done.output


@pytest.mark.parametrize(
    ("text", "host", "is_ip", "is_loopback"),
    [
        ("127.0.0.1:1", "127.0.0.1", True, True),
        ("[::1]:65535", "::1", True, True),
        ("localhost:0", "localhost", False, True),
        ("10.0.0.1:8443", "10.0.0.1", True, False),
        ("stock.internal:8443", "stock.internal", False, False),
    ],
)
def test_addresses_are_read_as_written(
    text: str, host: str, is_ip: bool, is_loopback: bool
) -> None:
    address = Address.parse(text)
    assert (address.host, address.is_ip, address.is_loopback) == (host, is_ip, is_loopback)
    assert str(address) == text


def socket_in(document: Any) -> str:
    (agent,) = [
        cluster
        for cluster in document["static_resources"]["clusters"]
        if cluster["name"] == "identity_broker_agent"
    ]
    endpoint = agent["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    path: str = endpoint["address"]["pipe"]["path"]
    return path


def dev_state(folder: Path, workload_api: str) -> None:
    folder.mkdir()
    broker = {
        "address": "127.0.0.1:1",
        "bootstrap_address": "127.0.0.1:2",
        "admin_socket": "/a",
        "http_address": "127.0.0.1:3",
    }
    document = {
        "trust_domain": "dev.test",
        "broker": broker,
        "openbao": {"address": ""},
        "bundle_file": "/b",
        "pid": 1,
        "workload_api": workload_api,
        "agent": {"admin_socket": "/c", "node_id": "spiffe://dev.test/n"},
    }
    (folder / "dev.json").write_text(json.dumps(document))


def test_the_agent_is_found_where_the_other_commands_find_it(tmp_path: Path) -> None:
    arguments = ("stock", *INBOUND, "--accept", ORDERS)
    assert "nothing says where" in refused(*arguments)
    variable: dict[str, str | None] = {"SPIFFE_ENDPOINT_SOCKET": "unix:/env.sock"}
    assert socket_in(printed(*arguments, env=variable)) == "/env.sock"
    dev_state(tmp_path / "dev", "unix:///dev.sock")
    assert socket_in(printed(*arguments, "--dir", "dev", env=variable)) == "/dev.sock"
    assert socket_in(printed(*arguments, "--dir", "dev", *SOCKET)) == "/run/api.sock"
    for address in ("tcp:127.0.0.1:1", "/run/api.sock", "unix:relative", "unix://host/path"):
        assert "is not the address" in refused(*arguments, "--workload-api", address)


def test_a_path_is_completed_with_the_trust_domain(tmp_path: Path) -> None:
    dev_state(tmp_path / "dev", "unix:///dev.sock")
    document = printed("stock", *INBOUND, "--accept", "/shop/orders", "--dir", "dev")
    assert peers(contexts(document)[0]) == ["spiffe://dev.test/shop/orders"]
    document = printed(
        *("stock", *INBOUND, "--accept", "/a", "--dir", "dev"), "--trust-domain", "other.test"
    )
    assert peers(contexts(document)[0]) == ["spiffe://other.test/a"]


def test_yaml_is_quoted_wherever_a_reader_could_guess_wrong() -> None:
    document = {
        "word": "STRICT_DNS",
        "@type": "type.googleapis.com/a.b",
        "no": "no",
        "null": "null",
        "number": "8443",
        "time": "0s",
        "empty": "",
        "colon": "a: b",
        "quote": 'say "x"',
        "flag": True,
        "port": 8443,
        "nothing": {},
        "none": [],
        "list": [{"a": 1, "b": ["c"]}, "d", ["e", "f"]],
    }
    assert to_yaml(document) == (
        "word: STRICT_DNS\n"
        '"@type": "type.googleapis.com/a.b"\n'
        '"no": "no"\n'
        '"null": "null"\n'
        'number: "8443"\n'
        'time: "0s"\n'
        'empty: ""\n'
        'colon: "a: b"\n'
        'quote: "say \\"x\\""\n'
        "flag: true\n"
        "port: 8443\n"
        "nothing: {}\n"
        "none: []\n"
        "list:\n"
        "- a: 1\n"
        "  b:\n"
        "  - c\n"
        "- d\n"
        "- - e\n"
        "  - f\n"
    )
