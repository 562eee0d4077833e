"""Messages of the Workload API out of states, where no socket is needed to see it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from identity_broker.agent.identity import BundleState, JwtIdentity, WorkloadState
from identity_broker.agent.workload_api import messages
from identity_broker.errors import InvariantViolated
from identity_ca.bundle import TrustBundle
from identity_ca.jwt import VerifiedJwt
from identity_ca.spiffe_id import SpiffeId, TrustDomain
from identity_client._wire.workload import X509SVIDResponse
from support.workload_identities import FakeIdentities

SOON = datetime(2030, 1, 1, tzinfo=UTC)


def state_of(fake: FakeIdentities) -> WorkloadState:
    return WorkloadState(
        tuple(grant.identity for grant in fake.grants),
        fake.bundle,
        fake.federated,
        fake.crls,
        1,
    )


def bundles_of(fake: FakeIdentities) -> BundleState:
    return BundleState(fake.bundle, fake.federated, fake.crls)


def jwt(hint: str, path: str) -> JwtIdentity:
    return JwtIdentity(f"spiffe://example.org{path}", hint, f"token-of-{path}", SOON)


@pytest.mark.clause("API-9")
def test_a_hint_stands_once_in_an_answer_and_the_first_svid_keeps_it() -> None:
    fake = FakeIdentities()
    for path, hint in (("/a", "internal"), ("/b", "internal"), ("/c", "external"), ("/d", "")):
        fake.grant(path, hint=hint)
    answer = messages.x509_svids(state_of(fake))
    assert [svid.hint for svid in answer.svids] == ["internal", "", "external", ""]
    assert len(answer.svids) == 4  # the SVID itself is not lost
    tokens = messages.jwt_svids([jwt("internal", "/a"), jwt("internal", "/b"), jwt("", "/c")])
    assert [svid.hint for svid in tokens.svids] == ["internal", "", ""]


def test_two_svids_of_one_spiffe_id_do_not_share_a_hint_either() -> None:
    fake = FakeIdentities()
    one = fake.grant("/a", hint="internal").identity
    twice = replace(state_of(fake), identities=(one, one))
    assert [s.hint for s in messages.x509_svids(twice).svids] == ["internal", ""]


@pytest.mark.clause("API-20")
def test_a_hint_longer_than_1024_bytes_is_left_out() -> None:
    fake = FakeIdentities()
    fake.grant("/a", hint="é" * 512)
    fake.grant("/b", hint="é" * 512 + "x")
    assert [len(s.hint.encode()) for s in messages.x509_svids(state_of(fake)).svids] == [1024, 0]


@pytest.mark.clause("API-20")
def test_the_order_of_the_state_is_the_order_of_the_answer() -> None:
    fake = FakeIdentities()
    for path in ("/z", "/a", "/m"):
        fake.grant(path)
    answer = messages.x509_svids(state_of(fake))
    assert [svid.spiffe_id for svid in answer.svids] == [
        f"spiffe://example.org{path}" for path in ("/z", "/a", "/m")
    ]


def test_an_svid_without_a_mandatory_field_never_leaves() -> None:
    fake = FakeIdentities()
    grant = fake.grant("/a")
    for broken in (replace(grant.identity, key=b""), replace(grant.identity, chain=())):
        with pytest.raises(InvariantViolated):
            messages.x509_svids(replace(state_of(fake), identities=(broken,)))
    empty = TrustBundle(TrustDomain("example.org"))
    with pytest.raises(InvariantViolated):
        messages.x509_svids(replace(state_of(fake), bundle=empty))


@pytest.mark.clause("API-10")
def test_x509_bundles_hold_no_jwt_key_and_jwt_bundles_no_certificate() -> None:
    fake = FakeIdentities()
    fake.grant("/a")
    fake.federate("other.org")
    x509 = messages.x509_bundles(bundles_of(fake))
    jwks = messages.jwt_bundles(bundles_of(fake))
    names = {"spiffe://example.org", "spiffe://other.org"}
    assert x509.bundles.keys() == jwks.bundles.keys() == names
    for name, bundle in (("other.org", fake.federated["other.org"]), ("example.org", fake.bundle)):
        assert x509.bundles[f"spiffe://{name}"] == b"".join(bundle.x509_authorities)
        assert not any(
            key.public_key_der in x509.bundles[f"spiffe://{name}"] for key in bundle.jwt_keys
        )
        assert b"x5c" not in jwks.bundles[f"spiffe://{name}"]


def test_a_trust_domain_without_x509_authorities_is_left_out_of_x509_bundles_alone() -> None:
    fake = FakeIdentities()
    fake.grant("/a")
    fake.federate("other.org")
    bare = replace(fake.federated["other.org"], x509_authorities=())
    state = replace(state_of(fake), federated={"other.org": bare})
    bundles = BundleState(state.bundle, state.federated, state.crls)
    assert not messages.x509_svids(state).federated_bundles
    assert messages.x509_bundles(bundles).bundles.keys() == {"spiffe://example.org"}
    assert "spiffe://other.org" in messages.jwt_bundles(bundles).bundles
    # The own one is always there, even empty (API-12, API-14).
    nothing = replace(bundles, bundle=TrustBundle(TrustDomain("example.org")))
    assert messages.x509_bundles(nothing).bundles["spiffe://example.org"] == b""
    assert messages.jwt_bundles(nothing).bundles["spiffe://example.org"] == b'{"keys":[]}'


def test_revocation_lists_that_would_make_the_answer_too_long_are_left_out() -> None:
    fake = FakeIdentities()
    fake.grant("/a")
    small, large = b"s" * 1000, b"l" * (messages.MAX_ANSWER_BYTES - 1000)
    state = replace(state_of(fake), crls=(large, small))
    answer = messages.x509_svids(state)
    assert list(answer.crl) == [small]
    assert answer.svids[0].x509_svid_key
    assert len(answer.SerializeToString()) <= messages.MAX_ANSWER_BYTES
    bundles = messages.x509_bundles(BundleState(fake.bundle, {}, (large, small)))
    assert list(bundles.crl) == [small]


@given(st.lists(st.integers(1, 2_000_000), max_size=6))
def test_no_answer_is_longer_than_a_client_takes(sizes: list[int]) -> None:
    fake = _ONE
    crls = tuple(bytes([65 + i]) * size for i, size in enumerate(sizes))
    answer = messages.x509_svids(replace(state_of(fake), crls=crls))
    raw = answer.SerializeToString()
    assert len(raw) <= messages.MAX_ANSWER_BYTES
    assert X509SVIDResponse.FromString(raw) == answer
    assert list(answer.crl) == [crl for crl in crls if crl in list(answer.crl)]


_ONE = FakeIdentities()
_ONE.grant("/a")


def verified(claims: dict[str, Any]) -> VerifiedJwt:
    return VerifiedJwt(
        SpiffeId.parse("spiffe://example.org/a"), ("x",), SOON, MappingProxyType(claims), "k"
    )


@pytest.mark.clause("API-15")
def test_claims_come_back_as_they_were() -> None:
    claims: dict[str, Any] = {
        "sub": "spiffe://example.org/a",
        "aud": ["x", "y"],
        "exp": 1795293181,
        "nested": {"list": [1, "two", None, True, {"three": 3.5}]},
        "nothing": None,
        "no": False,
    }
    answer = messages.validated(verified(claims))
    assert answer.spiffe_id == "spiffe://example.org/a"
    assert json_format.MessageToDict(answer.claims) == claims


@pytest.mark.parametrize(
    "value",
    [10**400, [1, 10**400], {"deep": 10**400}, float("inf")],
    ids=["number", "in a list", "in an object", "infinity"],
)
def test_a_claim_that_a_struct_cannot_hold_is_left_out_whole(value: Any) -> None:
    answer = messages.validated(verified({"aud": ["x"], "strange": value}))
    assert json_format.MessageToDict(answer.claims) == {"aud": ["x"]}


def test_claims_nested_beyond_reason_are_left_out() -> None:
    def nested(depth: int) -> Any:
        return [nested(depth - 1)] if depth else "core"

    answer = messages.validated(verified({"shallow": nested(16), "deep": nested(17)}))
    raw = answer.SerializeToString()
    assert set(type(answer).FromString(raw).claims.fields) == {"shallow"}


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=8), _JSON, max_size=5))
def test_any_claims_make_an_answer_that_can_be_read(claims: dict[str, Any]) -> None:
    answer = messages.validated(verified(claims))
    assert type(answer).FromString(answer.SerializeToString()) == answer
    assert set(answer.claims.fields) <= set(claims)
