"""The SPIFFE IDs the broker gives to itself and to nodes.

- Everything below "/idb/" belongs to the broker; no registration entry may issue it.
"""

from __future__ import annotations

from functools import lru_cache

from identity_ca.spiffe_id import SpiffeId, TrustDomain

RESERVED_PREFIX = "/idb"
_NODE_PREFIX = f"{RESERVED_PREFIX}/node/"


@lru_cache(maxsize=64)
def broker_id(trust_domain: TrustDomain) -> SpiffeId:
    """The broker's own SPIFFE ID, also the parent of node-group entries."""
    return SpiffeId.from_segments(trust_domain, "idb", "broker")


def node_id(trust_domain: TrustDomain, attestor: str, *name: str) -> SpiffeId:
    """The SPIFFE ID of a node that `attestor` vouched for.

    Raises:
        SpiffeIdError: a name segment is not a SPIFFE path segment.
    """
    return SpiffeId.from_segments(trust_domain, "idb", "node", attestor, *name)


def is_reserved(spiffe_id: SpiffeId) -> bool:
    """Whether the ID lies in the broker's own part of the trust domain."""
    path = spiffe_id.path.lower()
    return path == RESERVED_PREFIX or path.startswith(f"{RESERVED_PREFIX}/")


def is_node(spiffe_id: SpiffeId) -> bool:
    """Whether the ID is a node's."""
    return spiffe_id.path.startswith(_NODE_PREFIX)
