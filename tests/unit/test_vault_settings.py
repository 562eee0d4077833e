"""Settings and names that never reach a server."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity_ca.backends.vault.policy import VaultLayout, broker_policy, provisioner_policy
from identity_ca.backends.vault.transit import TransitKeyManager
from identity_ca.backends.vault.wire import VaultSettings, checked_path
from identity_ca.errors import BackendMisconfigured


@pytest.mark.parametrize(
    "address",
    [
        "https://bao:8200",
        "https://bao:8200/",
        "http://127.0.0.1:8200",
        "http://127.8.9.10:1",
        "http://[::1]:8200",
        "http://localhost:8200",
    ],
)
def test_an_address_that_can_be_used(address):
    assert VaultSettings(address=address).address == address


@pytest.mark.parametrize(
    "address",
    [
        "",
        "bao:8200",
        "ftp://bao",
        "https://",
        "http://bao:8200",
        "http://192.0.2.1:8200",
        "http://localhost.example.org",
        "https://user:secret@bao",
        "https://bao/v1",
        "https://bao?x=1",
    ],
)
def test_an_address_that_cannot(address):
    with pytest.raises(BackendMisconfigured) as refused:
        VaultSettings(address=address)
    assert "secret" not in str(refused.value)


def test_a_missing_certificate_file_is_named(tmp_path):
    with pytest.raises(BackendMisconfigured) as refused:
        VaultSettings(address="https://bao", ca_file=tmp_path / "none.pem")
    assert "none.pem" in refused.value.detail


@pytest.mark.parametrize("timeouts", [{"timeout": 0}, {"connect_timeout": -1}])
def test_a_timeout_must_be_positive(timeouts):
    with pytest.raises(BackendMisconfigured):
        VaultSettings(address="https://bao", **timeouts)


@given(st.text(max_size=40))
def test_a_path_that_passes_means_the_same_to_everybody(path):
    try:
        assert checked_path(path) == path
    except BackendMisconfigured:
        return
    assert path.isascii()
    assert path == path.strip("/")
    assert not {"", ".", ".."} & set(path.split("/"))
    assert not set(path) & set("%?#\\ \n\t;")


@pytest.mark.parametrize("name", ["", "a/../b", "a//b", "$x", "a\nb", 'a" { }'])
def test_a_name_cannot_change_the_policy(name):
    with pytest.raises(BackendMisconfigured):
        VaultLayout(pki_mount=name)


def test_the_policies_name_everything_of_the_layout():
    layout = VaultLayout(
        transit_mount="t/one", x509_key="kx", jwt_key="kj", pki_mount="p/two", issuer="i",
        approle_mount="ar", role="r", policy="po",
    )  # fmt: skip
    for rendered in (broker_policy(layout), provisioner_policy(layout)):
        assert "$" not in rendered
        assert "idb-" not in rendered
    assert 'path "t/one/sign/kx" {' in broker_policy(layout)
    assert 'path "p/two/issuer/i/sign-intermediate" {' in broker_policy(layout)


@pytest.mark.parametrize("name", ["", "..", "a/b", "a@b", "-x", "k" * 200])
def test_a_transit_key_name_must_fit_into_a_key_id(name):
    with pytest.raises(BackendMisconfigured):
        TransitKeyManager(None, names={"x509": name})  # type: ignore[arg-type]
