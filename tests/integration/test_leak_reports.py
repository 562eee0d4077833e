"""Whoever has a secret can end it: leaked keys and tokens reported over HTTP."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from identity_api.broker.v1 import credential_pb2, svid_pb2
from support.line import RunningBroker, csr_for, new_key, running, settings_in

REVOKED = credential_pb2.CREDENTIAL_STATE_REVOKED


@asynccontextmanager
async def http(broker: RunningBroker) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://{broker.addresses.http_address}") as client:
        yield client


def public_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> str:
    public = key.public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


async def reported(
    client: httpx.AsyncClient,
    key: ec.EllipticCurvePrivateKey,
    *,
    shown: ec.EllipticCurvePrivateKey | None = None,
    message: bytes | None = None,
) -> httpx.Response:
    """Report a key as leaked, as anybody who found it would."""
    asked = (await client.post("/leaks/challenge")).json()
    to_sign = base64.b64decode(asked["message"]) if message is None else message
    return await client.post(
        "/leaks",
        json={
            "public_key": public_pem(shown or key),
            "challenge": asked["challenge"],
            "signature": base64.b64encode(key.sign(to_sign, ec.ECDSA(hashes.SHA256()))).decode(),
        },
    )


async def test_a_leaked_key_dies_and_is_never_certified_again(broker: RunningBroker) -> None:
    node = await broker.join("leaky")
    entry = await broker.entry("/shop/leaky", "leaky")
    key = new_key()
    issued = await node.issue(entry.id, csr_for(key))
    assert issued.status.code == 0
    other = await node.issue(entry.id)
    async with http(broker) as client:
        answer = await reported(client, key)
        assert (answer.status_code, answer.json()) == (202, {"accepted": True})
        states = {each.id: each for each in await broker.ledger(spiffe_id=entry.spiffe_id)}
        assert states[issued.svid.serial].state == REVOKED
        assert states[issued.svid.serial].reason == credential_pb2.REVOCATION_REASON_KEY_COMPROMISE
        assert states[other.svid.serial].state != REVOKED
        again = await node.issue(entry.id, csr_for(key))
        assert again.status.reason == "KEY_BLOCKED"
        assert (await node.issue(entry.id)).status.code == 0
        # The same report again changes nothing and is answered alike.
        assert (await reported(client, key)).status_code == 202


async def test_who_has_not_the_key_ends_nothing(broker: RunningBroker) -> None:
    node = await broker.join("kept")
    entry = await broker.entry("/shop/kept", "kept")
    key = new_key()
    issued = await node.issue(entry.id, csr_for(key))
    async with http(broker) as client:
        forged = await reported(client, new_key(), shown=key)
        assert (forged.status_code, forged.json()["reason"]) == (400, "MALFORMED_REQUEST")
        elsewhere = await reported(client, key, message=b"something else that the key signed")
        assert elsewhere.status_code == 400
        stale = await client.post(
            "/leaks",
            json={"public_key": public_pem(key), "challenge": "AAAA", "signature": "AAAA"},
        )
        assert (stale.status_code, stale.json()["hint"]) == (
            400,
            "ask for a new one: POST /leaks/challenge",
        )
    [recorded] = await broker.ledger(spiffe_id=entry.spiffe_id)
    assert (recorded.id, recorded.state == REVOKED) == (issued.svid.serial, False)


async def test_a_key_nobody_knows_is_answered_like_any_other_and_not_kept(
    broker: RunningBroker,
) -> None:
    node = await broker.join("strangers")
    entry = await broker.entry("/shop/strangers", "strangers")
    key = new_key()
    async with http(broker) as client:
        answer = await reported(client, key)
        assert (answer.status_code, answer.json()) == (202, {"accepted": True})
    assert (await node.issue(entry.id, csr_for(key))).status.code == 0


async def test_an_rsa_key_signs_as_openssl_does(broker: RunningBroker) -> None:
    key = rsa.generate_private_key(65537, 2048)
    async with http(broker) as client:
        asked = (await client.post("/leaks/challenge")).json()
        signature = key.sign(
            base64.b64decode(asked["message"]), padding.PKCS1v15(), hashes.SHA256()
        )
        answer = await client.post(
            "/leaks",
            json={
                "public_key": public_pem(key),
                "challenge": asked["challenge"],
                "signature": base64.b64encode(signature).decode(),
            },
        )
        assert answer.status_code == 202


async def test_a_leaked_token_dies(broker: RunningBroker) -> None:
    node = await broker.join("tokens")
    entry = await broker.entry("/shop/tokens", "tokens")
    answer = await node.svids.BatchIssueJwt(
        svid_pb2.BatchIssueJwtRequest(
            items=[svid_pb2.BatchIssueJwtRequest.Item(entry_id=entry.id, audiences=["reports"])]
        )
    )
    token = answer.results[0].svid
    async with http(broker) as client:
        tampered = token.token[:-8] + "AAAAAAAA"
        assert (await client.post("/leaks", json={"token": tampered})).status_code == 202
        [before] = await broker.ledger(spiffe_id=entry.spiffe_id)
        assert before.state != REVOKED
        assert (await client.post("/leaks", json={"token": token.token})).status_code == 202
        [after] = await broker.ledger(spiffe_id=entry.spiffe_id)
        assert (after.id, after.state) == (token.jti, REVOKED)
        listed = (await client.get("/revocations")).json()
        assert [each["jti"] for each in listed["jtis"]] == [token.jti]


async def test_a_leaked_join_token_joins_nobody(broker: RunningBroker) -> None:
    token = await broker.token("never")
    async with http(broker) as client:
        assert (await client.post("/leaks", json={"token": token})).status_code == 202
    with pytest.raises(Exception, match="join token") as refused:
        await broker.attest(token)
    assert "JOIN_TOKEN_REJECTED" in str(refused.value) or refused.type.__name__ == "AioRpcError"


async def test_few_reports_are_looked_at(tmp_path: Path) -> None:
    strict = settings_in(tmp_path / "b", revocation={"leak_reports_per_minute": 2})
    async with running(strict) as broker, http(broker) as client:
        statuses = [(await client.post("/leaks/challenge")).status_code for _ in range(4)]
        assert statuses == [200, 200, 429, 429]
        refused = await client.post("/leaks", json={"token": "x"})
        assert (refused.status_code, refused.json()["reason"]) == (429, "RATE_LIMITED")
        assert int(refused.headers["retry-after"]) >= 1


async def test_reports_can_be_switched_off(tmp_path: Path) -> None:
    without = settings_in(tmp_path / "b", revocation={"leak_reports": False})
    async with running(without) as broker, http(broker) as client:
        assert (await client.post("/leaks/challenge")).status_code == 404


async def test_whatever_is_sent_is_refused_or_accepted(tmp_path: Path) -> None:
    values: Any = st.none() | st.integers() | st.text() | st.lists(st.text(), max_size=2)
    fields = st.dictionaries(
        st.sampled_from(["token", "public_key", "challenge", "signature", "else"]), values
    )
    bodies = st.binary(max_size=200) | fields.map(lambda found: json.dumps(found).encode())
    patient = settings_in(tmp_path / "b", revocation={"leak_reports_per_minute": 6000})
    async with running(patient) as broker, http(broker) as client:
        url = f"http://{broker.addresses.http_address}/leaks"
        assert (await client.post("/leaks", content=b"x" * 70_000)).status_code == 400

        @settings(max_examples=100, deadline=None)
        @given(bodies)
        def check(body: bytes) -> None:
            assert httpx.post(url, content=body).status_code in {202, 400}

        await asyncio.to_thread(check)
