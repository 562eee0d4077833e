"""SPIFFE-ID.md, clause by clause (ID-1 … ID-10)."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from typing import get_type_hints

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import identity_ca
from identity_ca import profile
from identity_ca.authority import AuthorityKind
from identity_ca.bundle import TrustBundle
from identity_ca.chain import verify_x509_svid
from identity_ca.errors import ChainRejected, ProfileViolation, SpiffeIdError, TokenRejected
from identity_ca.issuer import X509Credential, X509Issuer
from identity_ca.jwt import JwtCredential, JwtIssuer, verify_jwt_svid
from identity_ca.spiffe_id import MAX_ID_BYTES, SpiffeId, TrustDomain
from support.ca import hierarchy
from support.ca_material import NOW, TRUST_DOMAIN, WORKLOAD_ID, claims, forge, jwt_bundle


def refused(text: str) -> str:
    with pytest.raises(SpiffeIdError) as caught:
        SpiffeId.parse(text)
    assert caught.value.reason == "SPIFFE_ID_INVALID"
    assert caught.value.hint
    return caught.value.message


@pytest.mark.clause("ID-1")
@pytest.mark.parametrize(
    "text",
    [
        "",
        "spiffe",
        "spiffe:",
        "spiffe:/",
        "spiffe:/example.org",
        "//example.org/a",
        "http://example.org/a",
        "spiffe://",
        "spiffe:///a",
        "spiffe://example.org/a?",
        "spiffe://example.org/a?b=c",
        "spiffe://example.org?b",
        "spiffe://example.org/a#",
        "spiffe://example.org#a",
        " spiffe://example.org/a",
        "spiffe://example.org/a\n",
    ],
)
def test_id_1_scheme_trust_domain_no_query_no_fragment(text: str) -> None:
    message = refused(text)
    assert "ID-1" in message or "ID-5" in message  # a line end is a bad path character


@pytest.mark.clause("ID-2")
@pytest.mark.parametrize(
    "text",
    [
        "spiffe://user@example.org/a",
        "spiffe://user:secret@example.org/a",
        "spiffe://@example.org/a",
        "spiffe://example.org:8443/a",
        "spiffe://example.org:/a",
        "spiffe:///a",
    ],
)
def test_id_2_no_user_no_port_no_empty_host(text: str) -> None:
    assert "ID-2" in refused(text)


@pytest.mark.clause("ID-3")
@pytest.mark.parametrize(
    "name",
    [
        "Example.org",
        "EXAMPLE.ORG",
        "ex%61mple.org",
        "example org",
        "example+org",
        "exämple.org",
        "example.org\x00",
        "[::1]",
        "example,org",
        "\uff45xample.org",
    ],
)
def test_id_3_host_is_lower_case_and_of_few_characters(name: str) -> None:
    message = refused(f"spiffe://{name}/a")
    assert "ID-3" in message or name == "[::1]"
    with pytest.raises(SpiffeIdError):
        TrustDomain(name)


@pytest.mark.clause("ID-4")
@pytest.mark.parametrize(
    "name", ["10.0.0.1", "256.256.256.256", "a..b", ".", "-", "_", "..", "0", "a_b", "-a.-b", "a."]
)
def test_id_4_names_that_look_like_addresses_are_just_names(name: str) -> None:
    assert TrustDomain.parse(name).name == name
    assert str(SpiffeId.parse(f"spiffe://{name}/a")) == f"spiffe://{name}/a"


@pytest.mark.clause("ID-5")
@pytest.mark.parametrize(
    "path",
    [
        "/",
        "//",
        "/a/",
        "//a",
        "/a//b",
        "/.",
        "/..",
        "/./a",
        "/../a",
        "/a/.",
        "/a/..",
        "/a/./b",
        "/a/../b",
        "/a%2fb",
        "/%2e",
        "/%2e%2e/a",
        "/a b",
        "/a:b",
        "/a@b",
        "/a\\b",
        "/ä",
        "/a\x00b",
        "/a+b",
        "/a~b",
        "/a;b",
        "/a/b\n",
    ],
)
def test_id_5_path_has_no_dot_segments_no_encoding_no_empty_segment(path: str) -> None:
    assert "ID-5" in refused(f"spiffe://example.org{path}")


@pytest.mark.clause("ID-5")
@pytest.mark.parametrize("path", ["", "/a", "/...", "/.a", "/a.", "/..a/b..", "/-/_/0", "/A/b.C-d"])
def test_id_5_what_a_path_may_be(path: str) -> None:
    assert SpiffeId.parse(f"spiffe://example.org{path}").path == path


@pytest.mark.clause("ID-6")
def test_id_6_lengths() -> None:
    prefix = "spiffe://example.org/"
    longest = prefix + "a" * (MAX_ID_BYTES - len(prefix))
    assert len(longest) == 2048
    assert str(SpiffeId.parse(longest)) == longest
    assert "ID-6" in refused(longest + "a")
    domain = "a" * 255
    assert TrustDomain(domain).name == domain
    with pytest.raises(SpiffeIdError, match="ID-6"):
        TrustDomain(domain + "a")
    assert "ID-6" in refused(f"spiffe://{domain}a/b")
    with pytest.raises(SpiffeIdError, match="ID-6"):
        SpiffeId.from_segments(TrustDomain("example.org"), "a" * 2048)


@pytest.mark.clause("ID-7")
def test_id_7_upper_case_is_refused_in_scheme_and_host_and_kept_in_the_path() -> None:
    assert "ID-1" in refused("SPIFFE://example.org/a")
    assert "ID-1" in refused("Spiffe://example.org/a")
    assert "ID-7" in refused("spiffe://Example.org/a")
    assert SpiffeId.parse("spiffe://example.org/A") != SpiffeId.parse("spiffe://example.org/a")


@pytest.mark.clause("ID-8")
def test_id_8_the_authority_carries_the_trust_domains_own_id() -> None:
    domain = TrustDomain("example.org")
    assert str(domain.id) == "spiffe://example.org"
    assert domain.id.path == ""
    for certificate in (hierarchy().root, hierarchy().intermediate):
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == [str(domain.id)]


@pytest.mark.clause("ID-9")
def test_id_9_id_and_key_are_in_the_signed_part() -> None:
    credential = hierarchy().issue()
    leaf = x509.load_der_x509_certificate(credential.chain[0])
    signed = leaf.tbs_certificate_bytes
    assert str(credential.spiffe_id).encode() in signed
    spki = leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert spki in signed
    leaf.verify_directly_issued_by(hierarchy().intermediate)


@pytest.mark.clause("ID-10")
def test_id_10_the_library_makes_only_the_documents_spiffe_specifies() -> None:
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(identity_ca.__path__, "identity_ca.")
    ]
    classes = {
        each
        for module in modules
        for each in vars(module).values()
        if isinstance(each, type) and each.__module__ == module.__name__
    }
    # Whoever takes an identity and a key to it, in two steps, issues; and this is what comes out.
    issuers = {each for each in classes if hasattr(each, "prepare") and hasattr(each, "sign")}
    assert {each: get_type_hints(each.sign)["return"] for each in issuers} == {
        X509Issuer: X509Credential,
        JwtIssuer: JwtCredential,
    }
    signed = {
        each
        for each in classes
        if dataclasses.is_dataclass(each)
        and {"spiffe_id", "digest"} <= {field.name for field in dataclasses.fields(each)}
    }
    assert signed == {X509Credential, JwtCredential}
    assert set(AuthorityKind) == {AuthorityKind.X509, AuthorityKind.JWT}


@pytest.mark.clause("ID-10")
def test_id_10_every_leaf_profile_is_an_x509_svid_and_there_is_no_other() -> None:
    profiles = {each for each in vars(profile).values() if isinstance(each, profile.X509Profile)}
    leaves = {each for each in profiles if not each.ca}
    assert {each.name for each in leaves} == {"workload", "node", "broker"}
    below = hierarchy()
    for each in leaves:
        chain = below.issue(profile=each).chain
        assert verify_x509_svid(chain, bundle=below.bundle, now=NOW).spiffe_id == WORKLOAD_ID
    for each in profiles - leaves:
        with pytest.raises(ProfileViolation):
            below.issue(profile=each)


@pytest.mark.clause("ID-10")
@pytest.mark.parametrize(
    "typ",
    ["wit+jwt", "WIT+JWT", "application/wit+jwt", "wpt+jwt", "at+jwt", "vc+jwt", "logout+jwt"],
)
def test_id_10_another_kind_of_jwt_is_no_svid(typ: str) -> None:
    """Signed by the right key, with the right claims: the kind alone is wrong."""
    header = {"alg": "ES256", "kid": "key-1"}
    good = forge({**header, "typ": "JWT"}, claims())
    bundle = jwt_bundle()
    verify_jwt_svid(good, bundle=bundle, audience="reports", now=NOW)
    with pytest.raises(TokenRejected, match="J-6"):
        verify_jwt_svid(
            forge({**header, "typ": typ}, claims()), bundle=bundle, audience="reports", now=NOW
        )


@pytest.mark.clause("ID-10")
def test_id_10_a_key_for_another_kind_of_document_validates_neither() -> None:
    below = hierarchy()
    chain = below.issue().chain
    token = forge({"alg": "ES256", "kid": "key-1"}, claims())
    published = dataclasses.replace(below.bundle, jwt_keys=jwt_bundle().jwt_keys)
    document = json.loads(published.to_spiffe_json())

    def read() -> TrustBundle:
        return TrustBundle.from_spiffe_json(TRUST_DOMAIN, json.dumps(document).encode())

    verify_x509_svid(chain, bundle=read(), now=NOW)
    verify_jwt_svid(token, bundle=read(), audience="reports", now=NOW)
    assert [key["use"] for key in document["keys"]] == ["x509-svid", "jwt-svid"]
    for key in document["keys"]:
        key["use"] = "wit-svid"
    with pytest.raises(ChainRejected, match="no authority"):
        verify_x509_svid(chain, bundle=read(), now=NOW)
    with pytest.raises(TokenRejected, match="no key"):
        verify_jwt_svid(token, bundle=read(), audience="reports", now=NOW)


def test_members_and_order() -> None:
    a, b = TrustDomain("a.example"), TrustDomain("b.example")
    first, second = SpiffeId.from_segments(a, "x"), SpiffeId.from_segments(a, "y")
    assert sorted([SpiffeId(b, "/a"), second, first]) == [first, second, SpiffeId(b, "/a")]
    assert first.member_of(a)
    assert not first.member_of(b)
    assert len({first, SpiffeId.parse("spiffe://a.example/x")}) == 1


def test_values_cannot_be_changed_or_made_invalid() -> None:
    value = SpiffeId.parse("spiffe://example.org/a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.path = "/b"  # type: ignore[misc]
    with pytest.raises(SpiffeIdError):
        SpiffeId(TrustDomain("example.org"), "no-slash")
    with pytest.raises(SpiffeIdError):
        dataclasses.replace(value, path="/../b")


@pytest.mark.parametrize("segment", ["", ".", "..", "a/b", "%2e", "a b", "ä", "a\n"])
def test_a_segment_cannot_smuggle_a_path(segment: str) -> None:
    with pytest.raises(SpiffeIdError, match="ID-5"):
        SpiffeId.from_segments(TrustDomain("example.org"), "a", segment)


def test_trust_domain_from_name_or_id() -> None:
    assert TrustDomain.parse("example.org") == TrustDomain.parse("spiffe://example.org")
    for text in ("spiffe://example.org/a", "https://example.org", "", "spiffe://", "example.org/"):
        with pytest.raises(SpiffeIdError):
            TrustDomain.parse(text)


def test_messages_do_not_echo_input() -> None:
    assert "s3cret" not in refused("spiffe://user:s3cret@example.org/a")


@pytest.mark.parametrize(
    ("name", "is_dns"),
    [
        ("example.org", True),
        ("localhost", True),
        ("a-b.c9", True),
        ("10.0.0.1", False),
        ("a_b.org", False),
        ("-a.org", False),
        ("a-.org", False),
        ("a..org", False),
        ("example.org.", False),
        ("a" * 63 + ".org", True),
        ("a" * 64 + ".org", False),
    ],
)
def test_dns_san_exists_where_the_trust_domain_is_a_dns_name(name: str, is_dns: bool) -> None:
    identity = SpiffeId(TrustDomain(name), "/a")
    assert identity.trust_domain.is_dns_name is is_dns
    assert (identity.dns_san() is not None) is is_dns


def test_dns_san_is_the_hash_of_the_id() -> None:
    # python -c 'import base64,hashlib as h; print(base64.b32encode(
    #     h.sha256(b"spiffe://example.org/payments/api").digest()))'
    assert SpiffeId.parse("spiffe://example.org/payments/api").dns_san() == (
        "ybw722fydz2ymqahe7mcxiwxfg6bvn65fneqtipdx6u642wipvna.svid.example.org"
    )


def test_dns_san_must_fit_into_a_dns_name() -> None:
    label = "a" * 63
    fits = TrustDomain(f"{label}.{label}.{label}.aaa")
    assert len(fits.name) == 195
    assert len(SpiffeId(fits, "/a").dns_san() or "") == 253
    assert SpiffeId(TrustDomain(fits.name + "a"), "/a").dns_san() is None
