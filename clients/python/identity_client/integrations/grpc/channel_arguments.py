"""What both kinds of channel are made with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from spiffe import SpiffeId

from identity_client.credential import IdentitySnapshot
from identity_client.naming import parse_spiffe_id, server_name
from identity_client.rotation import Pins

__all__ = ["channel_credentials", "channel_options"]


def channel_credentials(snapshot: IdentitySnapshot, pins: Pins | None) -> grpc.ChannelCredentials:
    """Our certificate and key, and as the only roots the bundle, or what the server may show."""
    return grpc.ssl_channel_credentials(
        root_certificates=snapshot.bundle.roots_pem if pins is None else pins.pem,
        private_key=snapshot.x509.key_pem,
        certificate_chain=snapshot.x509.chain_pem,
    )


def channel_options(
    peer: str | SpiffeId, options: Sequence[tuple[str, Any]] | None
) -> tuple[tuple[str, Any], ...]:
    """The caller's options, and ours after them: the name to verify cannot be overridden.

    Raises:
        SettingsInvalid: `peer` is not a SPIFFE ID, or its trust domain not a DNS name.
    """
    pinned = {
        "grpc.ssl_target_name_override": server_name(parse_spiffe_id(peer)),
        # Connections are shared by target; a new certificate needs one of its own.
        "grpc.use_local_subchannel_pool": 1,
    }
    kept = [(key, setting) for key, setting in options or () if key not in pinned]
    return (*kept, *pinned.items())
