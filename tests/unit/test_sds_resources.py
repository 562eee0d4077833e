"""Which secret a name means, and what is in it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from envoy.extensions.transport_sockets.tls.v3 import tls_spiffe_validator_config_pb2 as validator

from identity_broker.agent.identity import WorkloadState, X509Identity
from identity_broker.agent.sds.messages import secret_of
from identity_broker.agent.sds.resources import (
    CertificateResource,
    ClientWishes,
    ValidationResource,
    resources_of,
)
from identity_ca.bundle import TrustBundle
from identity_ca.spiffe_id import TrustDomain


def identity(path: str, generation: str = "1") -> X509Identity:
    return X509Identity(
        entry_id=path,
        spiffe_id=f"spiffe://example.org{path}",
        hint="",
        chain=(f"leaf {path} {generation}".encode(), b"intermediate"),
        key=f"key {path} {generation}".encode(),
        serial=generation.rjust(40, "0"),
        not_after=datetime(2030, 1, 1, tzinfo=UTC),
    )


def bundle(name: str, *authorities: bytes) -> TrustBundle:
    return TrustBundle(TrustDomain(name), x509_authorities=authorities)


STATE = WorkloadState(
    identities=(identity("/orders"), identity("/orders/reports")),
    bundle=bundle("example.org", b"own root"),
    federated={"partner.test": bundle("partner.test", b"partner root")},
    crls=(b"crl",),
    revision=7,
)


def found(*names: str, state: WorkloadState = STATE, **options: Any) -> dict[str, Any]:
    return resources_of(state, names, **options)


def authorities(resource: Any) -> dict[str, tuple[bytes, ...]]:
    assert isinstance(resource, ValidationResource)
    return dict(resource.authorities)


def test_default_is_the_first_identity() -> None:
    (svid,) = found("default").values()
    assert isinstance(svid, CertificateResource)
    assert (svid.name, svid.spiffe_id) == ("default", "spiffe://example.org/orders")
    assert svid.key == b"key /orders 1"


def test_a_spiffe_id_is_that_identity() -> None:
    name = "spiffe://example.org/orders/reports"
    assert found(name)[name].key == b"key /orders/reports 1"


@pytest.mark.parametrize("name", ["ROOTCA", "spiffe://example.org", "example.org"])
def test_the_own_bundle_has_three_names(name: str) -> None:
    assert authorities(found(name)[name]) == {"example.org": (b"own root",)}


@pytest.mark.parametrize("name", ["spiffe://partner.test", "partner.test"])
def test_a_federated_bundle_goes_by_its_trust_domain(name: str) -> None:
    assert authorities(found(name)[name]) == {"partner.test": (b"partner root",)}


def test_all_has_each_trust_domain_apart() -> None:
    assert authorities(found("ALL")["ALL"]) == {
        "example.org": (b"own root",),
        "partner.test": (b"partner root",),
    }


def test_a_federated_bundle_cannot_speak_for_the_own_trust_domain() -> None:
    hostile = replace(STATE, federated={"example.org": bundle("example.org", b"not ours")})
    for name in ("ROOTCA", "ALL", "example.org", "spiffe://example.org"):
        assert authorities(found(name, state=hostile)[name]) == {"example.org": (b"own root",)}


@pytest.mark.parametrize(
    "name",
    [
        *("", "unknown", "rootca", "DEFAULT", "spiffe://", "spiffe://example.org/"),
        *("spiffe://example.org/other", "spiffe://EXAMPLE.org", "elsewhere.test", "*", "\0"),
        *("https://example.org/orders", "spiffe://example.org/orders/../orders", "x" * 5000),
    ],
)
def test_what_names_nothing_is_left_out(name: str) -> None:
    assert found(name, "default").keys() == {"default"}


def test_everything_goes_by_its_full_name() -> None:
    assert found(wildcard=True).keys() == {
        "spiffe://example.org/orders",
        "spiffe://example.org/orders/reports",
        "spiffe://example.org",
        "spiffe://partner.test",
    }
    assert "ALL" in found("ALL", wildcard=True)


def test_a_bundle_without_authorities_is_no_resource() -> None:
    """A validation context that trusts nobody cannot be said; Envoy would refuse it for ever."""
    none = replace(STATE, bundle=bundle("example.org"))
    assert found("ROOTCA", state=none) == {}
    assert authorities(found("ALL", state=none)["ALL"]) == {"partner.test": (b"partner root",)}


def test_a_new_certificate_is_a_new_version_and_nothing_else_is() -> None:
    rotated = replace(STATE, identities=(identity("/orders", "2"), STATE.identities[1]))
    again = replace(STATE, revision=99, crls=(b"another crl",))
    names = ("default", "spiffe://example.org/orders/reports", "ROOTCA", "ALL")
    before, after, same = (
        {name: r.version for name, r in found(*names, state=state).items()}
        for state in (STATE, rotated, again)
    )
    assert before == same
    assert [name for name in names if before[name] != after[name]] == ["default"]


def test_a_version_says_nothing_of_the_key() -> None:
    other_key = replace(STATE, identities=(replace(STATE.identities[0], key=b"another key"),))
    versions = {found("default", state=state)["default"].version for state in (STATE, other_key)}
    assert len(versions) == 1


def test_neither_key_nor_chain_is_in_a_representation() -> None:
    shown = repr(found("default", "ROOTCA"))
    assert "key /orders" not in shown
    assert "leaf" not in shown
    assert "own root" not in shown


# --- what a client may ask for in its metadata --------------------------------------------------


def test_a_plain_list_is_for_one_trust_domain_alone() -> None:
    plain = ClientWishes(plain=True)
    assert found("ROOTCA", wishes=plain)["ROOTCA"].plain
    assert found("spiffe://partner.test", wishes=plain)["spiffe://partner.test"].plain
    assert found("ALL", wishes=plain) == {}
    alone = replace(STATE, federated={})
    assert found("ALL", wishes=plain, state=alone)["ALL"].plain


def test_revocation_lists_come_with_the_own_trust_domain_in_a_plain_list() -> None:
    checked = ClientWishes(crls=True)
    own = found("ROOTCA", wishes=checked)["ROOTCA"]
    assert own.plain
    assert own.crls == (b"crl",)
    foreign = found("spiffe://partner.test", wishes=checked)["spiffe://partner.test"]
    assert not foreign.plain
    assert foreign.crls == ()


def test_rather_no_resource_than_one_without_the_revocation_lists_asked_for() -> None:
    checked = ClientWishes(crls=True)
    assert found("ROOTCA", wishes=checked, state=replace(STATE, crls=())) == {}
    assert found("ALL", wishes=checked) == {}


def test_a_new_revocation_list_is_a_new_version_for_who_asked() -> None:
    newer = replace(STATE, crls=(b"another crl",))
    versions = {
        found("ROOTCA", wishes=ClientWishes(crls=True), state=state)["ROOTCA"].version
        for state in (STATE, newer)
    }
    assert len(versions) == 2


# --- as Envoy's messages ------------------------------------------------------------------------


def test_a_certificate_is_written_as_pem_leaf_first() -> None:
    secret = secret_of(found("default")["default"])
    chain = secret.tls_certificate.certificate_chain.inline_bytes.decode()
    assert secret.name == "default"
    assert chain.count("BEGIN CERTIFICATE") == 2
    assert chain.index("bGVhZiAv") < chain.index("aW50ZXJt")  # "leaf /", "interm"
    assert secret.tls_certificate.private_key.inline_bytes.startswith(b"-----BEGIN PRIVATE KEY")


def test_authorities_go_through_the_spiffe_validator() -> None:
    context = secret_of(found("ALL")["ALL"]).validation_context
    assert not context.HasField("trusted_ca")
    assert context.custom_validator_config.name == "envoy.tls.cert_validator.spiffe"
    config = validator.SPIFFECertValidatorConfig()
    assert context.custom_validator_config.typed_config.Unpack(config)
    assert [domain.name for domain in config.trust_domains] == ["example.org", "partner.test"]
    assert all(
        domain.trust_bundle.inline_bytes.count(b"BEGIN CERTIFICATE") == 1
        for domain in config.trust_domains
    )


def test_a_plain_context_has_the_lists_and_only_checks_the_leaf_against_them() -> None:
    resource = found("ROOTCA", wishes=ClientWishes(crls=True))["ROOTCA"]
    context = secret_of(resource).validation_context
    assert not context.HasField("custom_validator_config")
    assert context.trusted_ca.inline_bytes.count(b"BEGIN CERTIFICATE") == 1
    assert context.crl.inline_bytes.count(b"BEGIN X509 CRL") == 1
    assert context.only_verify_leaf_cert_crl
