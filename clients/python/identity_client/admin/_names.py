"""The name that stands for the broker's SPIFFE ID in a DNS-only TLS check.

- `<base32(sha256(id))>.svid.<trust domain>`: every X.509-SVID carries it beside its URI SAN, so
  gRPC's server-name check pins one exact SPIFFE ID.
"""

from __future__ import annotations

import base64
import hashlib


def broker_server_name(trust_domain: str) -> str:
    """The DNS SAN of `spiffe://<trust domain>/idb/broker`."""
    digest = hashlib.sha256(f"spiffe://{trust_domain}/idb/broker".encode()).digest()
    label = base64.b32encode(digest).decode().rstrip("=").lower()
    return f"{label}.svid.{trust_domain}"
