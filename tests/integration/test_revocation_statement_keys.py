"""Statements signed by a key that this process never sees."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from base64 import urlsafe_b64decode

from identity_ca.bundle import TrustBundle
from identity_ca.spiffe_id import TrustDomain
from identity_ca.statement import verify_statement
from support.line import TRUST_DOMAIN, RunningBroker
from support.verifying import closed, verifying


async def test_a_remote_key_signs_as_a_local_one_does(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    svid = (await node.issue((await broker.entry("/api", "web-1")).id)).svid
    async with verifying(node.channel) as verifier:
        await broker.revoke(id=svid.serial, order_id="one")
        await verifier.message()
        statement = (await closed(broker, "one")).statement
    url = f"http://{broker.addresses.http_address}/bundle"

    def get() -> bytes:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bytes(answer.read())

    published = await asyncio.to_thread(get)
    bundle = TrustBundle.from_spiffe_json(TrustDomain(TRUST_DOMAIN), published)
    stated = verify_statement(statement, bundle)
    assert stated["credentials"]["ids"] == [svid.serial]
    assert stated["propagation"]["acknowledged"] == 1
    protected = json.loads(statement)["protected"]
    header = json.loads(urlsafe_b64decode(protected + "=" * (-len(protected) % 4)))
    assert header["typ"] == "idb-revocation+json"
