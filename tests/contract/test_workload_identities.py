"""Promises of the Workload API that the agent keeps, and the test's stand-in for it as well.

Tests of the faces alone use the stand-in; this holds it to what the real one does.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
from cryptography import x509
from google.protobuf import json_format

from identity_client._wire.workload import (
    JWTBundlesRequest,
    JWTSVIDRequest,
    ValidateJWTSVIDRequest,
    X509BundlesRequest,
    X509SVIDRequest,
)
from support.workload_api import header, refusal, refused_as
from support.workload_contract import Stage

DENIED = (grpc.StatusCode.PERMISSION_DENIED, "NO_IDENTITY")
OWN = "spiffe://example.org"


def svids(stage: Stage) -> Any:
    return stage.stub().FetchX509SVID(X509SVIDRequest(), metadata=header())


def bundles(stage: Stage) -> Any:
    return stage.stub().FetchX509Bundles(X509BundlesRequest(), metadata=header())


def jwt_bundles(stage: Stage) -> Any:
    return stage.stub().FetchJWTBundles(JWTBundlesRequest(), metadata=header())


def jwts(stage: Stage, *audiences: str, spiffe_id: str = "") -> Any:
    request = JWTSVIDRequest(audience=audiences, spiffe_id=spiffe_id)
    return stage.stub().FetchJWTSVID(request, metadata=header())


def validate(stage: Stage, svid: str, audience: str) -> Any:
    request = ValidateJWTSVIDRequest(svid=svid, audience=audience)
    return stage.stub().ValidateJWTSVID(request, metadata=header())


def paths_of(message: Any) -> list[str]:
    return [each.spiffe_id.removeprefix(OWN) for each in message.svids]


def leaf(svid: Any) -> x509.Certificate:
    size = 4 + int.from_bytes(svid.x509_svid[2:4], "big")
    return x509.load_der_x509_certificate(svid.x509_svid[:size])


async def entitled(stage: Stage, path: str) -> None:
    """Wait until the registration has arrived."""
    async with asyncio.timeout(10):
        while True:
            call = svids(stage)
            try:
                if f"{OWN}{path}" in {each.spiffe_id for each in (await call.read()).svids}:
                    return
            except grpc.aio.AioRpcError:
                pass
            finally:
                call.cancel()
            await asyncio.sleep(0.02)


async def next_with(call: Any, paths: list[str]) -> Any:
    """The next message that offers these and no others, whatever their order.

    What comes before are full states on the way there.
    """
    async with asyncio.timeout(10):
        while True:
            message = await call.read()
            assert message is not grpc.aio.EOF
            if sorted(paths_of(message)) == sorted(paths):
                return message


async def test_nobody_unregistered_gets_anything(stage: Stage) -> None:
    await stage.grant("/theirs", mine=False)
    for call in (svids(stage), bundles(stage), jwt_bundles(stage), jwts(stage, "x")):
        assert refused_as(await refusal(call)) == DENIED


async def test_a_registration_brings_an_svid_and_its_end_takes_it(stage: Stage) -> None:
    first = await stage.grant("/first")
    await entitled(stage, "/first")
    stream = svids(stage)
    await next_with(stream, ["/first"])
    began = time.perf_counter()
    second = await stage.grant("/second")
    await next_with(stream, ["/first", "/second"])
    assert time.perf_counter() - began < 5  # a push; polling would take longer
    await stage.withdraw(first)
    await next_with(stream, ["/second"])
    await stage.withdraw(second)
    assert refused_as(await refusal(stream)) == DENIED


async def test_the_order_of_identities_is_one_order(stage: Stage) -> None:
    """The first one is the default: it must not depend on when or how one asks."""
    hints = {"/z": "internal", "/a": "", "/m": "external"}
    for path, hint in hints.items():
        await stage.grant(path, hint=hint)
        await entitled(stage, path)
    first = await next_with(svids(stage), list(hints))
    order = paths_of(first)
    for _ in range(3):
        for message in (await next_with(svids(stage), list(hints)), await jwts(stage, "x")):
            assert paths_of(message) == order
            assert [each.hint for each in message.svids] == [hints[path] for path in order]


async def test_a_revoked_svid_is_replaced_and_on_the_list(stage: Stage) -> None:
    await stage.grant("/a")
    await entitled(stage, "/a")
    stream = svids(stage)
    revoked = leaf((await next_with(stream, ["/a"])).svids[0])
    await stage.revoke(revoked.serial_number)
    async with asyncio.timeout(10):
        while True:
            message = await next_with(stream, ["/a"])
            listed = [
                x509.load_der_x509_crl(der).get_revoked_certificate_by_serial_number(
                    revoked.serial_number
                )
                for der in message.crl
            ]
            fresh = leaf(message.svids[0])
            if any(listed) and fresh.serial_number != revoked.serial_number:
                break
    assert fresh.public_key() != revoked.public_key()  # what was lost may be in other hands


async def test_tokens_are_for_their_audience_and_validate(stage: Stage) -> None:
    await stage.grant("/a")
    await entitled(stage, "/a")
    (svid,) = (await jwts(stage, "reports", "billing", spiffe_id=f"{OWN}/a")).svids
    answer = await validate(stage, svid.svid, "billing")
    assert answer.spiffe_id == f"{OWN}/a"
    assert sorted(json_format.MessageToDict(answer.claims)["aud"]) == ["billing", "reports"]
    error = await refusal(validate(stage, svid.svid, "another"))
    assert refused_as(error) == (grpc.StatusCode.INVALID_ARGUMENT, "TOKEN_INVALID")
    error = await refusal(jwts(stage, "x", spiffe_id=f"{OWN}/not-mine"))
    assert refused_as(error) == DENIED
    error = await refusal(jwts(stage, "x" * 600))
    assert refused_as(error) == (grpc.StatusCode.INVALID_ARGUMENT, "AUDIENCE_INVALID")


async def test_bundles_verify_what_was_issued(stage: Stage) -> None:
    await stage.grant("/a")
    await entitled(stage, "/a")
    (svid,) = (await next_with(svids(stage), ["/a"])).svids
    message = await bundles(stage).read()
    assert message.bundles == {OWN: svid.bundle}
    assert (await jwt_bundles(stage).read()).bundles.keys() == {OWN}
