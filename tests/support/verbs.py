"""The verbs on a real store and real keys, without a server, with a clock that is set by hand."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from identity_broker.domain.caller import Caller, CallerClass
from identity_broker.domain.credential import RevocationReason
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.node import AttestedNode, Node
from identity_broker.domain.revocation import SubjectKind
from identity_broker.domain.selection import subject
from identity_broker.domain.selector import Selector
from identity_broker.lifecycle.authorize import Authorize, TtlPolicy
from identity_broker.lifecycle.directory import Directory
from identity_broker.lifecycle.issue import Issue, X509Order, one
from identity_broker.lifecycle.record import Record
from identity_broker.lifecycle.revoke import Ordered, OrderRequest, Revoke
from identity_broker.lifecycle.rotate import AuthorityPolicy, RotateAuthorities
from identity_broker.registry.entries import Entries
from identity_broker.signing import Signing
from identity_broker.store import Store
from identity_ca.authority import AuthorityKind
from identity_ca.backends.memory import MemoryKeyManager
from identity_ca.backends.selfsigned import SelfSignedUpstream
from identity_ca.issuer import X509Credential
from identity_ca.keys import KeyAlgorithm
from identity_ca.spiffe_id import SpiffeId, TrustDomain
from support.line import TRUST_DOMAIN, csr_for, new_key
from support.store import SettableClock, sqlite_url

START = datetime(2030, 1, 1, tzinfo=UTC)
DOMAIN = TrustDomain.parse(TRUST_DOMAIN)
NODE = SpiffeId.parse(f"spiffe://{TRUST_DOMAIN}/idb/node/join_token/web-1")
OPERATOR = Caller(frozenset({CallerClass.LOCAL}), "uid:0")
_SERIAL = re.compile(r"[0-9a-f]{40}")
LIFE = timedelta(hours=12)
HINT = timedelta(minutes=5)
TTL = TtlPolicy(
    x509=timedelta(hours=1),
    jwt=timedelta(minutes=5),
    node=timedelta(hours=1),
    max_x509=timedelta(hours=1),
    max_jwt=timedelta(hours=1),
)


class Parts:
    """Everything between the services and the store."""

    def __init__(self, store: Store, clock: SettableClock, keys: MemoryKeyManager) -> None:
        self.store = store
        self.clock = clock
        self.keys = keys
        self.directory = Directory(store, DOMAIN, clock)
        self.signing = Signing(
            trust_domain=DOMAIN, keys=keys, upstream=SelfSignedUpstream(), refresh_hint=HINT
        )
        self.authorize = Authorize(self.directory, DOMAIN, TTL, clock)
        self.record = Record(store, clock, unconfirmed_after=timedelta(minutes=1))
        self.issue = Issue(
            self.signing,
            self.record,
            clock,
            is_key_blocked=self.directory.is_key_blocked,
            epoch=self.directory.epoch,
        )
        self.rotate = RotateAuthorities(
            signing=self.signing,
            store=store,
            policy=AuthorityPolicy(KeyAlgorithm.EC_P256, LIFE, KeyAlgorithm.EC_P256, LIFE, HINT),
            clock=clock,
        )
        self.revoke = Revoke(
            store,
            self.directory,
            clock,
            self.issue.settled,
            revoke_authority=self.rotate.revoke,
        )
        self.entries = Entries(store, self.directory, DOMAIN, clock)

    def states(self, kind: AuthorityKind) -> list[str]:
        now = self.signing.authorities
        chosen = now.x509_set if kind is AuthorityKind.X509 else now.jwt_set
        return [authority.state.value for authority in chosen]

    async def admit(self) -> RegistrationEntry:
        """Attest a node by hand and register an entry below it."""
        attested = AttestedNode(NODE, "join_token", frozenset(), reattestable=False)
        credential = one(
            await self.issue.x509(
                [X509Order(self.authorize.attested(attested), csr_for(new_key()))]
            )
        )
        node = Node(
            NODE,
            "join_token",
            frozenset(),
            self.clock.now(),
            credential.serial,
            credential.not_after,
            reattestable=False,
        )
        await self.store.write(lambda repos: repos.nodes.upsert(node))
        return await self.register("api", "/payments/api")

    async def register(self, entry_id: str, path: str, **fields: object) -> RegistrationEntry:
        """Register an entry below the node."""
        values: dict[str, object] = {
            "id": entry_id,
            "spiffe_id": SpiffeId.parse(f"spiffe://{TRUST_DOMAIN}{path}"),
            "parent_id": NODE,
            "selectors": frozenset({Selector("unix", f"uid:{entry_id}")}),
        }
        entry = RegistrationEntry(**{**values, **fields})  # type: ignore[arg-type]
        [created] = await self.entries.create([entry], OPERATOR)
        assert isinstance(created, RegistrationEntry), created
        return created

    async def svid(self, entry_id: str = "api") -> X509Credential:
        """Issue one X.509-SVID."""
        grant = self.authorize.entry(NODE, entry_id)
        return one(await self.issue.x509([X509Order(grant, csr_for(new_key()))]))

    async def end(
        self,
        kind: SubjectKind,
        value: object,
        reason: RevocationReason = RevocationReason.KEY_COMPROMISE,
        **options: Any,
    ) -> Ordered:
        """Revoke something."""
        named = subject(kind, str(value), trust_domain=DOMAIN, now=self.clock.now())
        return await self.revoke.order(OrderRequest(named, reason, **options), OPERATOR)

    async def end_one(self, credential_id: str) -> Ordered:
        """Revoke one X.509-SVID by its serial, or one JWT-SVID by its jti."""
        kind = SubjectKind.SERIAL if _SERIAL.fullmatch(credential_id) else SubjectKind.JTI
        return await self.end(kind, credential_id)

    async def close(self) -> None:
        await self.revoke.close()
        await self.signing.close()


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncIterator[Parts]:
    """The verbs, with authorities in force."""
    clock = SettableClock(START)
    tmp_path.chmod(0o700)
    store = Store(sqlite_url(tmp_path), clock=clock)
    await store.migrate()
    built = Parts(store, clock, MemoryKeyManager())
    await built.directory.load()
    await built.rotate.start()
    yield built
    await built.close()
    await store.close()
