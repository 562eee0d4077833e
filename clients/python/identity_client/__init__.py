"""Identity Broker SDK: a SPIFFE identity for a Python program, kept fresh and checked.

    from identity_client import IdentitySource, client_ssl_context

    with IdentitySource.from_env() as source:
        source.wait_ready(timeout=10)
        context = client_ssl_context(source, authorize="spiffe://example.org/payments/api")

- `identity_client.aio.IdentitySource` is the same for asyncio.
- `identity_client.integrations.grpc` has channels, credentials and interceptors.
- `identity_client.testing` has sources with real certificates for your own tests.
- Every error is an `IdentityError`; the tree is at the top of `identity_client.errors`.
- Names are imported when they are first used: `identity_client.admin` needs no py-spiffe.
- SPIFFE types are py-spiffe's: SpiffeId, TrustDomain, X509Svid, X509Bundle, JwtSvid.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from identity_client import aio
    from identity_client.authorization import Authorize, PeerRule, any_of_trust_domain, below
    from identity_client.credential import BundleSnapshot, IdentitySnapshot, X509Material
    from identity_client.errors import (
        BrokerUnavailable,
        IdentityError,
        IdentityExpired,
        IdentityNotReady,
        IdentityRevoked,
        IdentityWithdrawn,
        PeerExpired,
        PeerRejected,
        PeerRevoked,
        RevocationsStale,
        SettingsInvalid,
        SourceClosed,
        SourceError,
    )
    from identity_client.holder import SourceState, SourceStatus
    from identity_client.peer import Peer
    from identity_client.source import IdentitySource
    from identity_client.staleness import StalenessPolicy
    from identity_client.tls import (
        SnapshotSource,
        client_ssl_context,
        peer_spiffe_id,
        server_ssl_context,
        verify_peer,
    )

__all__ = [
    "Authorize",
    "BrokerUnavailable",
    "BundleSnapshot",
    "IdentityError",
    "IdentityExpired",
    "IdentityNotReady",
    "IdentityRevoked",
    "IdentitySnapshot",
    "IdentitySource",
    "IdentityWithdrawn",
    "Peer",
    "PeerExpired",
    "PeerRejected",
    "PeerRevoked",
    "PeerRule",
    "RevocationsStale",
    "SettingsInvalid",
    "SnapshotSource",
    "SourceClosed",
    "SourceError",
    "SourceState",
    "SourceStatus",
    "StalenessPolicy",
    "X509Material",
    "aio",
    "any_of_trust_domain",
    "below",
    "client_ssl_context",
    "peer_spiffe_id",
    "server_ssl_context",
    "verify_peer",
]

_HOMES = {
    "Authorize": "identity_client.authorization",
    "BrokerUnavailable": "identity_client.errors",
    "BundleSnapshot": "identity_client.credential",
    "IdentityError": "identity_client.errors",
    "IdentityExpired": "identity_client.errors",
    "IdentityNotReady": "identity_client.errors",
    "IdentityRevoked": "identity_client.errors",
    "IdentitySnapshot": "identity_client.credential",
    "IdentitySource": "identity_client.source",
    "IdentityWithdrawn": "identity_client.errors",
    "Peer": "identity_client.peer",
    "PeerExpired": "identity_client.errors",
    "PeerRejected": "identity_client.errors",
    "PeerRevoked": "identity_client.errors",
    "PeerRule": "identity_client.authorization",
    "RevocationsStale": "identity_client.errors",
    "SettingsInvalid": "identity_client.errors",
    "SnapshotSource": "identity_client.tls",
    "SourceClosed": "identity_client.errors",
    "SourceError": "identity_client.errors",
    "SourceState": "identity_client.holder",
    "SourceStatus": "identity_client.holder",
    "StalenessPolicy": "identity_client.staleness",
    "X509Material": "identity_client.credential",
    "any_of_trust_domain": "identity_client.authorization",
    "below": "identity_client.authorization",
    "client_ssl_context": "identity_client.tls",
    "peer_spiffe_id": "identity_client.tls",
    "server_ssl_context": "identity_client.tls",
    "verify_peer": "identity_client.tls",
}

if not TYPE_CHECKING:  # so that a type checker still knows which names there are

    def __getattr__(name: str) -> object:
        if name == "aio":
            return importlib.import_module("identity_client.aio")
        if name not in _HOMES:
            raise AttributeError(f"module 'identity_client' has no attribute {name!r}")
        found = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted(__all__)
