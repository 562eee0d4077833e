"""The Workload API (SPIFFE_Workload_API.md): API-1 to API-4, API-6 and API-8 to API-20, our side.

On a real socket, with the standard's own messages. What a client must do is shown with our SDK
and with py-spiffe in their own tests.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Self

import grpc
import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_private_key,
)
from google.protobuf import json_format
from google.protobuf.message import Message

from identity_broker.errors import AgentNotReady
from identity_ca.chain import verify_x509_svid
from identity_ca.keys import KeyAlgorithm, algorithm_of
from identity_client._wire.workload import (
    METHODS,
    SERVICE_NAME,
    JWTBundlesRequest,
    JWTSVIDRequest,
    ValidateJWTSVIDRequest,
    X509BundlesRequest,
    X509SVIDRequest,
    X509SVIDResponse,
)
from support.workload_api import ServedWorkloadApi, header, refusal, refused_as
from support.workload_identities import everybody

INVALID = grpc.StatusCode.INVALID_ARGUMENT
DENIED = grpc.StatusCode.PERMISSION_DENIED
OWN = "spiffe://example.org"
OTHER = "spiffe://other.org"


def certificates(concatenated: bytes) -> list[x509.Certificate]:
    """DER certificates, one after the other."""
    found = []
    while concatenated:
        size = 4 + int.from_bytes(concatenated[2:4], "big")
        assert concatenated[:2] == b"\x30\x82"
        found.append(x509.load_der_x509_certificate(concatenated[:size]))
        concatenated = concatenated[size:]
    return found


class Api:
    """The five calls, as short as a test wants them."""

    def __init__(self, served: ServedWorkloadApi) -> None:
        self.identities = served.identities
        self.stub = served.stub()
        self.channel = served.channel()

    def svids(self) -> Any:
        return self.stub.FetchX509SVID(X509SVIDRequest(), metadata=header())

    def bundles(self) -> Any:
        return self.stub.FetchX509Bundles(X509BundlesRequest(), metadata=header())

    def jwt_bundles(self) -> Any:
        return self.stub.FetchJWTBundles(JWTBundlesRequest(), metadata=header())

    def jwts(self, *audiences: str, spiffe_id: str = "") -> Any:
        request = JWTSVIDRequest(audience=audiences, spiffe_id=spiffe_id)
        return self.stub.FetchJWTSVID(request, metadata=header())

    def validate(self, svid: str, audience: str) -> Any:
        request = ValidateJWTSVIDRequest(audience=audience, svid=svid)
        return self.stub.ValidateJWTSVID(request, metadata=header())


class Newest:
    """Reads a stream in the background and keeps what it said."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.messages: list[Any] = []

    @property
    def message(self) -> Any:
        return self.messages[-1] if self.messages else None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stream.cancel()
        with suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            await self._task

    async def _read(self) -> None:
        async for message in self._stream:
            self.messages.append(message)


@pytest.fixture
def api(workload_api: ServedWorkloadApi) -> Api:
    return Api(workload_api)


def ids(answer: Any) -> list[str]:
    return [each.spiffe_id.removeprefix(OWN) for each in answer.svids]


# --- section 1 and 4: profiles and streams --------------------------------------------------------


@pytest.mark.clause("API-1")
async def test_both_the_x509_and_the_jwt_profile_are_served(api: Api) -> None:
    api.identities.grant("/a")
    assert ids(await api.svids().read()) == ["/a"]
    assert OWN in (await api.bundles().read()).bundles
    tokens = await api.jwts("reports")
    assert ids(tokens) == ["/a"]
    assert OWN in (await api.jwt_bundles().read()).bundles
    assert (await api.validate(tokens.svids[0].svid, "reports")).spiffe_id == f"{OWN}/a"


@pytest.mark.clause("API-3")
async def test_every_message_is_the_full_state(api: Api) -> None:
    identities = api.identities
    identities.federate("other.org")
    grant = identities.grant("/a", federates_with=["other.org", "third.org"])
    identities.grant("/b")
    svids, x509s, jwts = Newest(api.svids()), Newest(api.bundles()), Newest(api.jwt_bundles())

    async def check(names: set[str], roots: int, paths: list[str]) -> None:
        def is_whole() -> bool:
            return (
                ids(svids.message) == paths
                and {OWN, *svids.message.federated_bundles} == names
                and set(x509s.message.bundles) == set(jwts.message.bundles) == names
                and len(certificates(x509s.message.bundles[OWN])) == roots
                and list(svids.message.crl) == list(x509s.message.crl) == list(identities.crls)
            )

        async with asyncio.timeout(5):
            while not (svids.message and x509s.message and jwts.message and is_whole()):
                await asyncio.sleep(0.01)
        # And it was so in every single one: nothing refers to what was said before.
        for message in svids.messages:
            for svid in message.svids:
                assert svid.spiffe_id
                assert certificates(svid.x509_svid)
                assert svid.x509_svid_key
                assert svid.bundle
        for message in (*x509s.messages, *jwts.messages):
            assert message.bundles[OWN]

    async with svids, x509s, jwts:
        await check({OWN, OTHER}, 1, ["/a", "/b"])
        identities.rotate(grant)
        await check({OWN, OTHER}, 1, ["/a", "/b"])
        identities.federate("third.org")
        await check({OWN, OTHER, "spiffe://third.org"}, 1, ["/a", "/b"])
        identities.unfederate("other.org")
        await check({OWN, "spiffe://third.org"}, 1, ["/a", "/b"])
        identities.rotate_authority()
        await check({OWN, "spiffe://third.org"}, 2, ["/a", "/b"])
        identities.withdraw(grant)
        await check({OWN}, 2, ["/b"])


@pytest.mark.clause("API-4")
async def test_a_request_is_answered_at_once(api: Api) -> None:
    api.identities.grant("/a")
    await api.svids().read()  # the connection
    for call in (api.svids, api.bundles, api.jwt_bundles):
        began = time.perf_counter()
        for _ in range(20):
            stream = call()
            await stream.read()  # without anything happening that would cause a message
            stream.cancel()
        assert (time.perf_counter() - began) / 20 < 0.5


@pytest.mark.clause("API-4")
async def test_an_agent_that_cannot_answer_says_so_at_once(api: Api) -> None:
    api.identities.refuse(AgentNotReady())
    began = time.perf_counter()
    error = await refusal(api.svids())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert time.perf_counter() - began < 3


@pytest.mark.clause("API-6")
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda api: api.jwts(), "AUDIENCE_INVALID"),
        (lambda api: api.jwts(""), "AUDIENCE_INVALID"),
        (lambda api: api.jwts("a", ""), "AUDIENCE_INVALID"),
        (lambda api: api.jwts("a", spiffe_id="not-a-spiffe-id"), "SPIFFE_ID_INVALID"),
        (lambda api: api.jwts("a", spiffe_id="https://example.org/a"), "SPIFFE_ID_INVALID"),
        (lambda api: api.validate("", "a"), "MALFORMED_REQUEST"),
        (lambda api: api.validate("a.b.c", ""), "MALFORMED_REQUEST"),
        (lambda api: api.validate("", ""), "MALFORMED_REQUEST"),
    ],
    ids=["no audience", "empty", "one empty", "no id", "https", "no svid", "no aud", "nothing"],
)
async def test_a_mandatory_field_that_is_missing_is_an_invalid_argument(
    api: Api, call: Callable[[Api], Any], reason: str
) -> None:
    api.identities.grant("/a")
    assert refused_as(await refusal(call(api))) == (INVALID, reason)


@pytest.mark.parametrize("method", sorted(METHODS.values()))
async def test_bytes_that_are_no_message_are_an_invalid_argument(api: Api, method: str) -> None:
    call = api.channel.unary_stream(method)(b"\xff\xff\xff", metadata=header())
    assert refused_as(await refusal(call)) == (INVALID, "MALFORMED_REQUEST")


# --- section 5: X.509-SVIDs -----------------------------------------------------------------------


@pytest.mark.clause("API-8")
@pytest.mark.parametrize(
    "algorithm", [KeyAlgorithm.EC_P256, KeyAlgorithm.EC_P384, KeyAlgorithm.RSA_2048]
)
async def test_an_svid_is_a_chain_leaf_first_its_key_and_its_bundle(
    api: Api, algorithm: KeyAlgorithm
) -> None:
    api.identities.grant("/payments/api", algorithm=algorithm, hint="internal")
    (svid,) = (await api.svids().read()).svids
    chain = certificates(svid.x509_svid)
    (uri,) = (
        chain[0]
        .extensions.get_extension_for_class(x509.SubjectAlternativeName)
        .value.get_values_for_type(x509.UniformResourceIdentifier)
    )
    assert uri == svid.spiffe_id == f"{OWN}/payments/api"
    chain[0].verify_directly_issued_by(chain[1])
    assert len(chain) == 2
    (root,) = certificates(svid.bundle)
    chain[1].verify_directly_issued_by(root)
    key = load_der_private_key(svid.x509_svid_key, password=None)  # PKCS #8, no password
    assert svid.x509_svid_key.startswith(b"\x30")
    assert b"ENCRYPTED" not in svid.x509_svid_key
    public = key.public_key()
    assert algorithm_of(public) is algorithm
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    assert public.public_bytes(*form) == chain[0].public_key().public_bytes(*form)
    assert svid.hint == "internal"
    for field in ("spiffe_id", "x509_svid", "x509_svid_key", "bundle"):
        assert getattr(svid, field)
    verify_x509_svid(
        [each.public_bytes(Encoding.DER) for each in chain],
        bundle=api.identities.bundle,
        now=api.identities.clock.now(),
    )


@pytest.mark.clause("API-9")
async def test_a_hint_is_unique_in_every_answer(api: Api) -> None:
    for path, hint in (("/a", "internal"), ("/b", "internal"), ("/c", "external")):
        api.identities.grant(path, hint=hint)
    for _ in range(3):  # the same SVID keeps it, time after time
        svids = (await api.svids().read()).svids
        assert [each.hint for each in svids] == ["internal", "", "external"]
        tokens = (await api.jwts("x")).svids
        assert [each.hint for each in tokens] == ["internal", "", "external"]
        api.identities.rotate()


@pytest.mark.clause("API-10")
async def test_no_key_of_one_use_is_in_a_bundle_of_the_other(api: Api) -> None:
    api.identities.federate("other.org")
    api.identities.grant("/a", federates_with=["other.org"])
    x509_bundles = (await api.bundles().read()).bundles
    jwt_bundles = (await api.jwt_bundles().read()).bundles
    assert set(x509_bundles) == set(jwt_bundles) == {OWN, OTHER}
    for name, bundle in (
        (OWN, api.identities.bundle),
        (OTHER, api.identities.federated["other.org"]),
    ):
        of_x509 = {c.public_bytes(Encoding.DER) for c in certificates(x509_bundles[name])}
        assert of_x509 == set(bundle.x509_authorities)
        of_jwt = {key["kid"] for key in json.loads(jwt_bundles[name])["keys"]}
        assert of_jwt == {key.key_id for key in bundle.jwt_keys}


@pytest.mark.clause("API-11")
async def test_whoever_is_entitled_to_nothing_is_denied(api: Api) -> None:
    api.identities.grant("/not-yours", who=lambda caller: False)
    for call in (api.svids, api.bundles, api.jwt_bundles, lambda: api.jwts("x")):
        assert refused_as(await refusal(call())) == (DENIED, "NO_IDENTITY")


@pytest.mark.clause("API-11")
async def test_a_stream_is_denied_when_everything_is_taken_away(api: Api) -> None:
    first, second = api.identities.grant("/a"), api.identities.grant("/b")
    stream, bundles = api.svids(), api.bundles()
    assert ids(await stream.read()) == ["/a", "/b"]
    await bundles.read()
    api.identities.withdraw(first)
    assert ids(await stream.read()) == ["/b"]  # something is left: no end
    began = time.perf_counter()
    api.identities.withdraw(second)
    assert refused_as(await refusal(stream)) == (DENIED, "NO_IDENTITY")
    assert time.perf_counter() - began < 3
    assert refused_as(await refusal(bundles)) == (DENIED, "NO_IDENTITY")
    # Entitled again, served again.
    api.identities.grant("/c")
    assert ids(await api.svids().read()) == ["/c"]


@pytest.mark.clause("API-12")
async def test_x509_bundles_hold_the_own_trust_domain_s(api: Api) -> None:
    api.identities.bundles_for_all = True  # without any identity, too, where the agent says so
    bundles = (await api.bundles().read()).bundles
    assert bundles == {OWN: b"".join(api.identities.bundle.x509_authorities)}


async def test_a_revoked_svid_is_in_the_list_at_once_and_replaced(api: Api) -> None:
    grant = api.identities.grant("/a")
    svids, bundles = api.svids(), api.bundles()
    assert certificates((await svids.read()).svids[0].x509_svid)
    await bundles.read()
    serial = int(api.identities.revoke(grant), 16)
    crls = [x509.load_der_x509_crl((await each.read()).crl[0]) for each in (svids, bundles)]
    for crl in crls:
        assert crl.get_revoked_certificate_by_serial_number(serial) is not None
        assert crl.next_update_utc
        assert crl.next_update_utc > api.identities.clock.now()
    (svid,) = (await api.svids().read()).svids
    leaf, issuer = certificates(svid.x509_svid)
    assert crls[0].get_revoked_certificate_by_serial_number(leaf.serial_number) is None
    assert crls[0].is_signature_valid(issuer.public_key())  # type: ignore[arg-type]


# --- section 6: JWT-SVIDs -------------------------------------------------------------------------


@pytest.mark.clause("API-13")
async def test_the_audiences_asked_for_are_in_the_token(api: Api) -> None:
    api.identities.grant("/a")
    (svid,) = (await api.jwts("reports", "https://billing.example.org")).svids
    claims = jwt.decode(svid.svid, options={"verify_signature": False})
    assert claims["aud"] == ["reports", "https://billing.example.org"]
    assert claims["sub"] == svid.spiffe_id == f"{OWN}/a"


@pytest.mark.clause("API-13")
async def test_without_a_spiffe_id_there_is_a_token_for_every_identity(api: Api) -> None:
    for path in ("/b", "/a", "/c"):
        api.identities.grant(path)
    assert ids(await api.jwts("x")) == ["/b", "/a", "/c"]
    assert ids(await api.jwts("x", spiffe_id=f"{OWN}/a")) == ["/a"]
    error = await refusal(api.jwts("x", spiffe_id=f"{OWN}/another"))
    assert refused_as(error) == (DENIED, "NO_IDENTITY")


@pytest.mark.clause("API-14")
async def test_jwt_bundles_are_standard_jwk_sets(api: Api) -> None:
    api.identities.federate("other.org")
    api.identities.grant("/a", federates_with=["other.org"])
    bundles = (await api.jwt_bundles().read()).bundles
    assert set(bundles) == {OWN, OTHER}
    (token,) = (await api.jwts("reports")).svids
    keys = jwt.PyJWKSet.from_json(bundles[OWN].decode())  # RFC 7517, read by another library
    kid = jwt.get_unverified_header(token.svid)["kid"]
    (key,) = (each for each in keys.keys if each.key_id == kid)
    assert jwt.decode(token.svid, key, algorithms=["ES256"], audience="reports")["sub"]
    for document in bundles.values():
        for each in json.loads(document)["keys"]:
            assert each["kid"]
            assert each["use"] == "sig"
            assert not {"x5c", "d"} & each.keys()


@pytest.mark.clause("API-15")
async def test_a_token_is_validated_and_its_claims_are_answered(api: Api) -> None:
    api.identities.grant("/a")
    (token,) = (await api.jwts("reports", "billing")).svids
    answer = await api.validate(token.svid, "billing")
    assert answer.spiffe_id == f"{OWN}/a"
    claims = json_format.MessageToDict(answer.claims)
    assert claims == jwt.decode(token.svid, options={"verify_signature": False})
    assert answer.HasField("claims")


@pytest.mark.clause("API-15")
async def test_a_token_that_does_not_hold_is_an_invalid_argument(api: Api) -> None:
    api.identities.grant("/a")
    (token,) = (await api.jwts("reports")).svids
    head, claims, signature = token.svid.split(".")
    for svid, audience in (
        (token.svid, "another"),
        (f"{head}.{claims}.{signature[:-4]}AAAA", "reports"),
        (f"{head}.{claims}", "reports"),
        ("nonsense", "reports"),
        ("x" * 20_000, "reports"),
    ):
        assert refused_as(await refusal(api.validate(svid, audience))) == (INVALID, "TOKEN_INVALID")


@pytest.mark.clause("API-16")
async def test_a_token_is_validated_with_the_bundle_of_its_own_trust_domain(api: Api) -> None:
    api.identities.federate("other.org")
    grant = api.identities.grant("/a", federates_with=["other.org"])
    foreign = api.identities.foreign_token("other.org", "/reports", "x")
    assert (await api.validate(foreign, "x")).spiffe_id == "spiffe://other.org/reports"
    # No bundle, no trust: whoever does not federate with that domain cannot validate.
    api.identities.withdraw(grant)
    api.identities.grant("/b")
    assert refused_as(await refusal(api.validate(foreign, "x"))) == (INVALID, "TOKEN_INVALID")


# --- section 7: WIT-SVIDs are not supported -------------------------------------------------------


@pytest.mark.clause("API-17")
@pytest.mark.clause("API-18")
@pytest.mark.clause("API-19")
@pytest.mark.parametrize("name", ["FetchWITSVID", "FetchWITBundles", "ValidateWITSVID"])
async def test_every_call_of_the_wit_profile_is_unimplemented(api: Api, name: str) -> None:
    api.identities.grant("/a")
    for call in (api.channel.unary_unary, api.channel.unary_stream, api.channel.stream_stream):
        started = call(f"/{SERVICE_NAME}/{name}")
        argument = iter([b""]) if call is api.channel.stream_stream else b""
        error = await refusal(started(argument, metadata=header()))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED


# --- section 8: the default identity --------------------------------------------------------------


@pytest.mark.clause("API-20")
async def test_the_first_svid_stays_the_first(api: Api) -> None:
    for path in ("/z", "/a", "/m"):
        api.identities.grant(path, hint=path)
    stream = api.svids()
    for _ in range(5):
        assert ids(await stream.read()) == ["/z", "/a", "/m"]
        assert ids(await api.jwts("x")) == ["/z", "/a", "/m"]
        api.identities.rotate()


async def test_many_changes_are_one_message_for_whoever_is_slow(api: Api) -> None:
    """A state that was replaced before it was sent is never sent (API-3 makes it useless)."""
    grant = api.identities.grant("/a", ttl=timedelta(hours=2))
    stream = api.svids()
    await stream.read()
    for _ in range(200):
        api.identities.rotate(grant)
    newest = api.identities.grants[0].identity.chain
    received: list[Message] = []
    while not received or received[-1].svids[0].x509_svid != b"".join(newest):  # type: ignore[attr-defined]
        received.append(await stream.read())
    assert isinstance(received[-1], X509SVIDResponse)
    assert len(received) < 50


async def test_streams_of_two_processes_do_not_wait_for_each_other(
    workload_api: ServedWorkloadApi,
) -> None:
    workload_api.identities.grant("/a", who=everybody)
    calls = [Api(workload_api).svids() for _ in range(20)]
    await asyncio.gather(*(call.read() for call in calls))
    workload_api.identities.rotate()
    await asyncio.gather(*(call.read() for call in calls))
    assert workload_api.identities.watchers == 20
    for call in calls:
        call.cancel()
    async with asyncio.timeout(5):
        while workload_api.identities.watchers:
            await asyncio.sleep(0.01)
