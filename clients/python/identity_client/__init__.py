"""Identity Broker SDK: a SPIFFE identity for a Python program, kept fresh and checked.

    from identity_client import IdentitySource, client_ssl_context

    with IdentitySource.from_env() as source:
        source.wait_ready(timeout=10)
        context = client_ssl_context(source, authorize="spiffe://example.org/payments/api")

- `identity_client.aio.IdentitySource` is the same for asyncio.
- `identity_client.integrations.grpc` has channels, credentials and interceptors.
- `identity_client.testing` has sources with real certificates for your own tests.
- Every error is an `IdentityError`; the tree is at the top of `identity_client.errors`.
- SPIFFE types are py-spiffe's: SpiffeId, TrustDomain, X509Svid, X509Bundle, JwtSvid.
"""

from __future__ import annotations

from identity_client import aio
from identity_client.authorization import Authorize, PeerRule, any_of_trust_domain, below
from identity_client.credential import BundleSnapshot, IdentitySnapshot, X509Material
from identity_client.errors import (
    BrokerUnavailable,
    IdentityError,
    IdentityExpired,
    IdentityNotReady,
    IdentityRevoked,
    PeerExpired,
    PeerRejected,
    PeerRevoked,
    SettingsInvalid,
    SourceClosed,
    SourceError,
)
from identity_client.holder import SourceState, SourceStatus
from identity_client.peer import Peer
from identity_client.source import IdentitySource
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
    "Peer",
    "PeerExpired",
    "PeerRejected",
    "PeerRevoked",
    "PeerRule",
    "SettingsInvalid",
    "SnapshotSource",
    "SourceClosed",
    "SourceError",
    "SourceState",
    "SourceStatus",
    "X509Material",
    "aio",
    "any_of_trust_domain",
    "below",
    "client_ssl_context",
    "peer_spiffe_id",
    "server_ssl_context",
    "verify_peer",
]
