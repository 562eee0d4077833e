"""Node: attested nodes and the tokens that let new ones join."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from identity_api.broker.v1 import node_pb2 as pb
from identity_broker.domain.node import Node
from identity_broker.registry.nodes import Nodes
from identity_broker.server.rpc.call import Call
from identity_broker.server.rpc.convert import nodes as convert_node
from identity_broker.server.rpc.convert import scalars
from identity_broker.server.rpc.pipeline import ServiceFunction


class NodeService:
    """Listing, banning, evicting and inviting nodes."""

    def __init__(self, nodes: Nodes, is_revoked: Callable[[str], bool]) -> None:
        self._nodes = nodes
        self._is_revoked = is_revoked

    def functions(self) -> Mapping[str, ServiceFunction]:
        """Full method name to service function."""
        service = "/identity_api.broker.v1.Node/"
        return {
            f"{service}List": self.list,
            f"{service}Get": self.get,
            f"{service}Ban": self.ban,
            f"{service}Evict": self.evict,
            f"{service}CreateJoinToken": self.create_join_token,
        }

    async def list(self, request: pb.ListNodesRequest, call: Call) -> pb.ListNodesResponse:
        """Return a page of nodes."""
        scope = scalars.page_scope(call.method, request)
        page = await self._nodes.page(
            convert_node.from_node_filter(request),
            scalars.from_page_token(request.page_token, scope),
            scalars.from_page_size(request.page_size),
        )
        return pb.ListNodesResponse(
            nodes=[self._record(node) for node in page.items],
            next_page_token=scalars.to_page_token(page.next_key, scope),
        )

    async def get(self, request: pb.GetNodeRequest, _call: Call) -> pb.GetNodeResponse:
        """Return one node."""
        node = await self._nodes.get(scalars.from_spiffe_id(request.spiffe_id, "spiffe_id"))
        return pb.GetNodeResponse(node=self._record(node))

    async def ban(self, request: pb.BanNodeRequest, call: Call) -> pb.BanNodeResponse:
        """Refuse a node from now on."""
        node, revoked = await self._nodes.ban(
            scalars.from_spiffe_id(request.spiffe_id, "spiffe_id"),
            scalars.from_text(request.reason, "reason"),
            call.caller,
        )
        return pb.BanNodeResponse(node=self._record(node), revoked=revoked)

    async def evict(self, request: pb.EvictNodeRequest, call: Call) -> pb.EvictNodeResponse:
        """Forget a node."""
        revoked = await self._nodes.evict(
            scalars.from_spiffe_id(request.spiffe_id, "spiffe_id"), call.caller
        )
        return pb.EvictNodeResponse(revoked=revoked)

    async def create_join_token(
        self, request: pb.CreateJoinTokenRequest, call: Call
    ) -> pb.CreateJoinTokenResponse:
        """Make a token that attests one node once."""
        secret, token = await self._nodes.create_join_token(
            scalars.from_seconds(request.ttl_seconds, "ttl_seconds"),
            scalars.from_text(request.node_name, "node_name"),
            call.caller,
        )
        return pb.CreateJoinTokenResponse(
            token=secret,
            expires_at=scalars.to_epoch(token.expires_at),
            node_id=str(token.node_id),
        )

    def _record(self, node: Node) -> pb.NodeRecord:
        return convert_node.to_node(node, is_revoked=self._is_revoked(node.serial))
