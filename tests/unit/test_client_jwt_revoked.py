"""JWT-SVIDs that are revoked: by name, with their identity, with the key that signed them."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import Any

import jwt
import pytest
from spiffe import JwtSvid

from identity_client import IdentityRevoked, PeerRevoked
from identity_client.clock import utc_now
from identity_client.jwt_cache import CachedToken, JwtCache, JwtKey
from identity_client.jwt_check import is_revoked
from identity_client.jwt_fetch import JwtFetcher
from identity_client.revocation import IdentityEpoch, RevokedCredential
from identity_client.testing import FakeIdentitySource, FakeTrustDomain

WEB = "spiffe://example.org/web"
HOUR = timedelta(hours=1)


@pytest.fixture
def domain() -> FakeTrustDomain:
    return FakeTrustDomain("example.org")


@pytest.fixture
def api(domain: FakeTrustDomain) -> FakeIdentitySource:
    return domain.source("spiffe://example.org/api")


def token(domain: FakeTrustDomain, **claims: Any) -> str:
    now = int(utc_now().timestamp())
    stated = {"sub": WEB, "aud": ["orders"], "exp": now + 600, "iat": now, "jti": "abcd"}
    kept = {name: value for name, value in (stated | claims).items() if value is not None}
    return jwt.encode(kept, domain._jwt_key, algorithm="ES256", headers={"kid": "fake-1"})


def refused(source: FakeIdentitySource, text: str) -> None:
    with pytest.raises(PeerRevoked) as error:
        source.validate_jwt_svid(text, "orders")
    assert error.value.reason == "PEER_REVOKED"
    assert text not in str(error.value)


def test_by_name(domain: FakeTrustDomain, api: FakeIdentitySource) -> None:
    text = token(domain)
    api.validate_jwt_svid(text, "orders")
    api.learn_revocation(RevokedCredential("abcd", WEB, utc_now() + HOUR, shown_in_tls=False))
    refused(api, text)
    api.validate_jwt_svid(token(domain, jti="other"), "orders")
    api.validate_jwt_svid(token(domain, jti=None), "orders")


def test_with_its_identity(domain: FakeTrustDomain, api: FakeIdentitySource) -> None:
    now = int(utc_now().timestamp())
    text = token(domain, iat=now - 10)
    api.validate_jwt_svid(text, "orders")
    api.denied.raise_epoch(IdentityEpoch(WEB, now - 5, now + 600))
    refused(api, text)
    refused(api, token(domain, iat=now - 5))
    refused(api, token(domain, iat=None))  # Nobody can say that it is newer.
    api.validate_jwt_svid(token(domain, iat=now - 4), "orders")
    api.validate_jwt_svid(token(domain, iat=now - 10, sub=f"{WEB}2"), "orders")


def test_with_the_key_that_signed_it(domain: FakeTrustDomain, api: FakeIdentitySource) -> None:
    text = token(domain)
    api.denied.deny_authorities(["fake-2"])
    api.validate_jwt_svid(text, "orders")
    api.denied.deny_authorities(["fake-1"])
    refused(api, text)


def test_our_own_tokens_are_not_handed_out_any_more(
    domain: FakeTrustDomain, api: FakeIdentitySource
) -> None:
    svid = domain.source(WEB).fetch_jwt_svid("orders")
    now = utc_now()
    cache, key = JwtCache(), (WEB, frozenset({"orders"}))
    cache.put(key, CachedToken(svid=svid, jti="", received=now, expires_at=now + HOUR))
    assert cache.fresh(key, denied=api.denied, now=now) is svid
    assert not is_revoked(svid, api.denied)
    moment = int(now.timestamp())
    api.denied.raise_epoch(IdentityEpoch(WEB, moment + 1, moment + 600))
    assert cache.fresh(key, denied=api.denied, now=now) is None
    assert cache.fallback(key, denied=api.denied, now=now) is None


class Issuing:
    """Issues what a test says; of a real holder's identity."""

    def __init__(self, source: FakeIdentitySource, ages: list[int]) -> None:
        self.source = source
        self.ages = ages  # in seconds, of the tokens to come; the last for ever
        self.asked: list[float] = []

    async def __call__(self, key: JwtKey) -> CachedToken:
        now = utc_now()
        age = self.ages[min(len(self.asked), len(self.ages) - 1)]
        self.asked.append(now.timestamp())
        text = token(self.source._domain, iat=int(now.timestamp()) - age, sub=key[0])
        svid = JwtSvid.parse_insecure(text, {"orders"})
        return CachedToken(svid=svid, jti="abcd", received=now, expires_at=now + HOUR)


async def test_what_is_issued_in_the_second_of_the_revocation_is_not_handed_out(
    domain: FakeTrustDomain,
) -> None:
    web = domain.source(WEB)
    await asyncio.sleep(1 - time.time() % 1)  # A second begins: what comes now is of it.
    moment = int(time.time())
    web.denied.raise_epoch(IdentityEpoch(WEB, moment, moment + 600))
    issuing = Issuing(web, [0])
    fetcher = JwtFetcher(web._holder, issuing)
    svids = await asyncio.gather(*(fetcher.fetch(["orders"]) for _ in range(3)))
    assert len({one.token for one in svids}) == 1
    assert not is_revoked(svids[0], web.denied)
    assert int(issuing.asked[0]) == moment
    assert len(issuing.asked) == 2
    assert (await fetcher.fetch(["orders"])).token == svids[0].token


async def test_whoever_is_issued_nothing_but_what_is_revoked_is_told(
    domain: FakeTrustDomain,
) -> None:
    web = domain.source(WEB)
    moment = int(time.time())
    web.denied.raise_epoch(IdentityEpoch(WEB, moment, moment + 600))
    issuing = Issuing(web, [60])
    with pytest.raises(IdentityRevoked):
        await JwtFetcher(web._holder, issuing).fetch(["orders"])
    assert len(issuing.asked) == 3
