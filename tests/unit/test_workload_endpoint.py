"""EP-6, EP-7, EP-8: where a Workload API may be, and what is refused."""

from __future__ import annotations

import os

import pytest

from identity_client import SettingsInvalid
from identity_client.environment import any_settings_from_env
from identity_client.settings import SourceSettings
from identity_client.workload_api.endpoint import Endpoint
from identity_client.workload_api.settings import WorkloadApiSettings

BROKER = {
    "IDENTITY_BROKER_ADDRESS": "127.0.0.1:8081",
    "IDENTITY_BROKER_BOOTSTRAP_ADDRESS": "127.0.0.1:8082",
    "IDENTITY_BROKER_BUNDLE_FILE": "/nowhere/bundle.pem",
    "IDENTITY_BROKER_TRUST_DOMAIN": "example.org",
    "IDENTITY_BROKER_JOIN_TOKEN": "idbt_secret-token",
}
SOCKET = {"SPIFFE_ENDPOINT_SOCKET": "unix:///run/agent/api.sock"}


@pytest.mark.clause("EP-6")
def test_without_an_address_the_environment_s_is_taken() -> None:
    assert Endpoint.named(None, SOCKET).target == "unix:/run/agent/api.sock"
    assert Endpoint.named("unix:///other", SOCKET).target == "unix:/other"
    for env in ({}, {"SPIFFE_ENDPOINT_SOCKET": ""}):
        with pytest.raises(SettingsInvalid) as refused:
            Endpoint.named(None, env)
        assert refused.value.reason == "ENDPOINT_MISSING"
        assert "SPIFFE_ENDPOINT_SOCKET" in str(refused.value)


@pytest.mark.clause("EP-6")
def test_the_source_reads_the_environment_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("IDENTITY_BROKER_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", "unix:///run/agent/api.sock")
    from identity_client import IdentitySource, aio

    for source in (
        IdentitySource.from_env(),
        aio.IdentitySource.from_env(),
        IdentitySource.from_workload_api(),
        aio.IdentitySource.from_workload_api(),
    ):
        inner = source._source if isinstance(source, IdentitySource) else source
        assert isinstance(inner.settings, WorkloadApiSettings)
        assert inner.settings.endpoint.uri == "unix:///run/agent/api.sock"


@pytest.mark.clause("EP-7")
@pytest.mark.parametrize(
    ("uri", "target"),
    [
        ("unix:///a/b.sock", "unix:/a/b.sock"),
        ("unix:/a/b.sock", "unix:/a/b.sock"),
        ("unix:///a%20b/%3f.sock", "unix:/a%20b/%3F.sock"),
        (f"unix:///{'a' * 106}", f"unix:/{'a' * 106}"),
    ],
)
def test_unix_addresses(uri: str, target: str) -> None:
    endpoint = Endpoint.parse(uri)
    assert (endpoint.target, str(endpoint)) == (target, uri)


@pytest.mark.clause("EP-7")
@pytest.mark.parametrize(
    "uri",
    [
        "",
        "/a/b.sock",
        "a/b.sock",
        "unix",
        "unix:",
        "unix://",
        "unix:///",
        "unix:a/b.sock",
        "unix:./b.sock",
        "unix://host/a",
        "unix://a/b.sock",
        "unix://user@/a",
        "unix://:80/a",
        "unix:///a?",
        "unix:///a?x=y",
        "unix:///a#",
        "unix:///a#f",
        "unix:///a%00b",
        "unix:///a b",
        "unix:///a\nb",
        " unix:///a",
        "unix:///a\u00e4",
        f"unix:///{'a' * 107}",
        "unix-abstract:name",
        "http://127.0.0.1:80",
        "https://127.0.0.1:80",
        "dns:///example.org:80",
        "ipv4:127.0.0.1:80",
        "file:///a",
        "spiffe://example.org/a",
        "[",
        "tcp://[",
    ],
)
def test_what_is_no_unix_address(uri: str) -> None:
    with pytest.raises(SettingsInvalid) as refused:
        Endpoint.parse(uri)
    assert refused.value.reason == "ENDPOINT_INVALID"
    assert "unix:///absolute/path" in refused.value.hint


@pytest.mark.clause("EP-8")
@pytest.mark.parametrize(
    ("uri", "target"),
    [
        ("tcp://127.0.0.1:8000", "ipv4:127.0.0.1:8000"),
        ("tcp://169.254.0.7:1", "ipv4:169.254.0.7:1"),
        ("tcp://[::1]:65535", "ipv6:[::1]:65535"),
    ],
)
def test_tcp_addresses(uri: str, target: str) -> None:
    assert Endpoint.parse(uri).target == target


@pytest.mark.clause("EP-8")
@pytest.mark.parametrize(
    "uri",
    [
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:-1",
        "tcp://127.0.0.1:http",
        "tcp://:8000",
        "tcp://",
        "tcp:127.0.0.1:8000",
        "tcp:///127.0.0.1:8000",
        "tcp://localhost:8000",
        "tcp://example.org:8000",
        "tcp://127.0.0.1:8000/",
        "tcp://127.0.0.1:8000/foo",
        "tcp://127.0.0.1:8000?x",
        "tcp://127.0.0.1:8000#x",
        "tcp://user@127.0.0.1:8000",
        "tcp://user:word@127.0.0.1:8000",
        "tcp://@127.0.0.1:8000",
        "tcp://127.1:8000",
        "tcp://0x7f000001:8000",
        "tcp://::1:8000",
        "tcp://[::1]",
    ],
)
def test_what_is_no_tcp_address(uri: str) -> None:
    with pytest.raises(SettingsInvalid) as refused:
        Endpoint.parse(uri)
    assert refused.value.reason == "ENDPOINT_INVALID"


# --- which kind of source ----------------------------------------------------------------------


def test_a_broker_named_in_the_environment_wins_over_a_socket() -> None:
    assert isinstance(any_settings_from_env(BROKER), SourceSettings)
    assert isinstance(any_settings_from_env(BROKER | SOCKET), SourceSettings)
    with pytest.raises(SettingsInvalid) as refused:
        any_settings_from_env(SOCKET | {"IDENTITY_BROKER_ADDRESS": "127.0.0.1:1"})
    assert "IDENTITY_BROKER_BUNDLE_FILE is not set" in refused.value.message


def test_who_to_be_may_be_said_with_a_socket_too() -> None:
    found = any_settings_from_env(
        SOCKET | {"IDENTITY_BROKER_SPIFFE_ID": "spiffe://example.org/web"}
    )
    assert isinstance(found, WorkloadApiSettings)
    assert str(found.spiffe_id) == "spiffe://example.org/web"


def test_an_empty_environment_names_the_socket_as_the_way_out() -> None:
    with pytest.raises(SettingsInvalid) as refused:
        any_settings_from_env({})
    assert "SPIFFE_ENDPOINT_SOCKET" in refused.value.hint
