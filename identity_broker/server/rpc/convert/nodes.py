"""Nodes."""

from __future__ import annotations

from identity_api.broker.v1 import (
    node_pb2,
)
from identity_broker.domain.node import Node
from identity_broker.domain.paging import (
    NodeFilter,
)
from identity_broker.errors import (
    MalformedRequest,
)
from identity_broker.server.rpc.convert.entries import to_selector
from identity_broker.server.rpc.convert.scalars import from_text, to_epoch


def to_node(node: Node, *, is_revoked: bool) -> node_pb2.NodeRecord:
    """A node's message; `is_revoked`: its SVID is."""
    return node_pb2.NodeRecord(
        spiffe_id=str(node.spiffe_id),
        attestor=node.attestor,
        selectors=[to_selector(selector) for selector in sorted(node.selectors)],
        attested_at=to_epoch(node.attested_at),
        serial=node.serial,
        expires_at=to_epoch(node.expires_at),
        banned=node.banned,
        ban_reason=node.ban_reason,
        reattestable=node.reattestable,
        svid_revoked=is_revoked,
    )


def from_node_filter(request: node_pb2.ListNodesRequest) -> NodeFilter:
    """Parse what nodes are wanted.

    Raises:
        MalformedRequest: naming the field.
    """
    wanted = {
        node_pb2.BANNED_FILTER_UNSPECIFIED: None,
        node_pb2.BANNED_FILTER_BANNED: True,
        node_pb2.BANNED_FILTER_NOT_BANNED: False,
    }
    if request.banned not in wanted:
        raise MalformedRequest("banned is not a value this broker knows")
    attestor = from_text(request.attestor, "attestor")
    return NodeFilter(attestor=attestor, banned=wanted[request.banned])
