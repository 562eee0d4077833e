"""Svid: the service everything else is there for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from identity_api.broker.v1 import svid_pb2, types_pb2
from identity_broker.domain.grant import Grant
from identity_broker.errors import BrokerError, Unauthenticated
from identity_broker.lifecycle.authorize import Authorize
from identity_broker.lifecycle.issue import Issue, JwtOrder, X509Order
from identity_broker.server.rpc import convert
from identity_broker.server.rpc.call import Call
from identity_broker.server.rpc.pipeline import ServiceFunction
from identity_broker.server.rpc.status import item_status
from identity_ca.spiffe_id import SpiffeId

I = TypeVar("I")  # noqa: E741
O = TypeVar("O")  # noqa: E741

_OK = types_pb2.Status(code=0)


class SvidService:
    """X.509- and JWT-SVIDs for the entries of the calling node."""

    def __init__(self, authorize: Authorize, issue: Issue) -> None:
        self._authorize = authorize
        self._issue = issue

    def functions(self) -> Mapping[str, ServiceFunction]:
        """Full method name to service function."""
        service = "/identity_api.broker.v1.Svid/"
        return {
            f"{service}BatchIssueX509": self.batch_issue_x509,
            f"{service}BatchIssueJwt": self.batch_issue_jwt,
        }

    async def batch_issue_x509(
        self, request: svid_pb2.BatchIssueX509Request, call: Call
    ) -> svid_pb2.BatchIssueX509Response:
        """Issue X.509-SVIDs, each with its own status."""
        convert.from_batch(request.items, "items")
        orders, refused = self._orders(
            request.items, call, lambda item, grant: X509Order(grant, item.csr)
        )
        response = svid_pb2.BatchIssueX509Response()
        issued = iter(await self._issue.x509(orders, call.correlation_id) if orders else ())
        grants = iter(orders)
        for at in range(len(request.items)):
            result: object = refused.get(at)
            hint = ""
            if result is None:
                result, hint = next(issued), next(grants).grant.hint
            if isinstance(result, BrokerError):
                response.results.add(status=item_status(result))
            else:
                response.results.add(status=_OK, svid=convert.to_x509_svid(result, hint))  # type: ignore[arg-type]
        return response

    async def batch_issue_jwt(
        self, request: svid_pb2.BatchIssueJwtRequest, call: Call
    ) -> svid_pb2.BatchIssueJwtResponse:
        """Issue JWT-SVIDs, each with its own status."""
        convert.from_batch(request.items, "items")
        orders, refused = self._orders(
            request.items, call, lambda item, grant: JwtOrder(grant, tuple(item.audiences))
        )
        response = svid_pb2.BatchIssueJwtResponse()
        issued = iter(await self._issue.jwt(orders, call.correlation_id) if orders else ())
        grants = iter(orders)
        for at in range(len(request.items)):
            result: object = refused.get(at)
            hint = ""
            if result is None:
                result, hint = next(issued), next(grants).grant.hint
            if isinstance(result, BrokerError):
                response.results.add(status=item_status(result))
            else:
                response.results.add(status=_OK, svid=convert.to_jwt_svid(result, hint))  # type: ignore[arg-type]
        return response

    def _orders(
        self, items: Sequence[I], call: Call, order: Callable[[I, Grant], O]
    ) -> tuple[list[O], dict[int, BrokerError]]:
        node_id = calling_node(call)
        orders: list[O] = []
        refused: dict[int, BrokerError] = {}
        for at, item in enumerate(items):
            try:
                grant = self._authorize.entry(node_id, item.entry_id)  # type: ignore[attr-defined]
            except BrokerError as error:
                refused[at] = error
            else:
                orders.append(order(item, grant))
        return orders, refused


def calling_node(call: Call) -> SpiffeId:
    """Return the calling node's SPIFFE ID.

    Raises:
        Unauthenticated: the method table let someone else in.
    """
    if call.caller.spiffe_id is None:
        raise Unauthenticated(detail=call.caller.name)
    return call.caller.spiffe_id
