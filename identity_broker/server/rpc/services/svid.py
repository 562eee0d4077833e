"""Svid: the service everything else is there for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from identity_api.broker.v1 import svid_pb2, types_pb2
from identity_broker.domain.grant import Grant
from identity_broker.errors import BrokerError, Unauthenticated
from identity_broker.lifecycle.authorize import Authorize
from identity_broker.lifecycle.issue import Issue, JwtOrder, X509Order
from identity_broker.server.rpc.call import Call
from identity_broker.server.rpc.convert import credentials as convert_credential
from identity_broker.server.rpc.convert import scalars
from identity_broker.server.rpc.pipeline import ServiceFunction
from identity_broker.server.rpc.status import item_status
from identity_broker.telemetry.metrics import Metrics
from identity_ca.spiffe_id import SpiffeId

Order = TypeVar("Order", X509Order, JwtOrder)
Issued = TypeVar("Issued")

_OK = types_pb2.Status(code=0)
_MAX_INSTANCE = 128


class SvidService:
    """X.509- and JWT-SVIDs for the entries of the calling node."""

    def __init__(self, authorize: Authorize, issue: Issue, metrics: Metrics) -> None:
        self._authorize = authorize
        self._issue = issue
        self._metrics = metrics

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
        scalars.from_batch(request.items, "items")
        node_id = calling_node(call)
        planned = [self._x509_order(node_id, item) for item in request.items]
        results = await self._issue.x509(_orders(planned), call.correlation_id)
        response = svid_pb2.BatchIssueX509Response()
        for order, result in _merged(planned, results):
            answer = response.results.add()
            if isinstance(order, BrokerError) or result is None or isinstance(result, BrokerError):
                answer.status.CopyFrom(self._refused("x509", order, result))
            else:
                answer.status.CopyFrom(_OK)
                convert_credential.fill_x509_svid(answer.svid, result, order.grant.hint)
        self._count("x509", results)
        return response

    async def batch_issue_jwt(
        self, request: svid_pb2.BatchIssueJwtRequest, call: Call
    ) -> svid_pb2.BatchIssueJwtResponse:
        """Issue JWT-SVIDs, each with its own status."""
        scalars.from_batch(request.items, "items")
        node_id = calling_node(call)
        planned: list[JwtOrder | BrokerError] = []
        for item in request.items:
            grant = self._granted(node_id, item.entry_id)
            planned.append(
                grant if isinstance(grant, BrokerError) else JwtOrder(grant, tuple(item.audiences))
            )
        results = await self._issue.jwt(_orders(planned), call.correlation_id)
        response = svid_pb2.BatchIssueJwtResponse()
        for order, result in _merged(planned, results):
            answer = response.results.add()
            if isinstance(order, BrokerError) or result is None or isinstance(result, BrokerError):
                answer.status.CopyFrom(self._refused("jwt", order, result))
            else:
                answer.status.CopyFrom(_OK)
                convert_credential.fill_jwt_svid(answer.svid, result, order.grant.hint)
        self._count("jwt", results)
        return response

    def _x509_order(
        self, node_id: SpiffeId, item: svid_pb2.BatchIssueX509Request.Item
    ) -> X509Order | BrokerError:
        try:
            instance = scalars.from_text(item.instance, "instance", _MAX_INSTANCE)
            return X509Order(self._authorize.entry(node_id, item.entry_id), item.csr, instance)
        except BrokerError as error:
            return error

    def _granted(self, node_id: SpiffeId, entry_id: str) -> Grant | BrokerError:
        try:
            return self._authorize.entry(node_id, entry_id)
        except BrokerError as error:
            return error

    def _refused(self, kind: str, order: object, result: object) -> types_pb2.Status:
        error = order if isinstance(order, BrokerError) else result
        if not isinstance(error, BrokerError):
            return _OK
        self._metrics.refused_total.labels(kind, error.reason).inc()
        return item_status(error)

    def _count(self, kind: str, results: Sequence[object]) -> None:
        issued = sum(not isinstance(result, BrokerError) for result in results)
        self._metrics.issued_total.labels(kind).inc(issued)


def _orders(planned: Sequence[Order | BrokerError]) -> list[Order]:
    return [item for item in planned if not isinstance(item, BrokerError)]


def _merged(
    planned: Sequence[Order | BrokerError], results: Sequence[Issued]
) -> Iterator[tuple[Order, Issued] | tuple[BrokerError, None]]:
    """Each order with its result, and each refusal, in the request's order."""
    issued = iter(results)
    for item in planned:
        if isinstance(item, BrokerError):
            yield item, None
        else:
            yield item, next(issued)


def calling_node(call: Call) -> SpiffeId:
    """Return the calling node's SPIFFE ID.

    Raises:
        Unauthenticated: the method table let someone else in.
    """
    if call.caller.spiffe_id is None:
        raise Unauthenticated(detail=call.caller.name)
    return call.caller.spiffe_id
