"""gRPC over mutual TLS that follows rotation, with the peer authorised on every call.

    server = grpc.server(pool, interceptors=[authorize_peers(source, "spiffe://example.org/web")])
    server.add_secure_port("0.0.0.0:8443", server_credentials(source))

    channel = secure_channel(source, "api:8443", peer="spiffe://example.org/api")
    stub = GreeterStub(channel)        # keeps working across rotations

    aio: authorize_peers_aio, secure_channel_aio; server_credentials serves both.

- Servers: a certificate is read again for every handshake; a call is refused unless its peer's
  SPIFFE ID is named, its certificate has not expired and is not revoked, also on a connection
  that was opened long before. Long streams are checked again with every message, and calls of a
  peer that is revoked are ended whatever they wait for.
- Clients: the server must be exactly `peer` (its hash-of-ID DNS SAN, checked by gRPC in the
  handshake). A new certificate means a new channel below the wrapper; calls under way finish on
  the old one.
- grpcio does not show a client the server's certificate. When an X.509-SVID of `peer` or an
  authority is revoked, calls under way are cancelled, and until that has expired the server is
  looked at before it is called: see `guard`. Revocation lists do not say whose serial numbers they
  are: where there is no feed of a broker or of our own node agent, any entry has this effect.
"""

from __future__ import annotations

from identity_client.integrations.grpc.aio_channel import RotatingAioChannel, secure_channel_aio
from identity_client.integrations.grpc.channel import RotatingChannel, secure_channel
from identity_client.integrations.grpc.server import (
    authorize_peers,
    authorize_peers_aio,
    peer_spiffe_id,
    server_credentials,
)

__all__ = [
    "RotatingAioChannel",
    "RotatingChannel",
    "authorize_peers",
    "authorize_peers_aio",
    "peer_spiffe_id",
    "secure_channel",
    "secure_channel_aio",
    "server_credentials",
]
