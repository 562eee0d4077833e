"""Revocations and holds, as an operator sees them.

- `revoke` always sends an id, so that an answer that was lost can be asked for again: it is the
  same revocation.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from datetime import timedelta

import grpc

from identity_api.broker.v1 import revocation_pb2 as pb
from identity_api.broker.v1 import revocation_pb2_grpc
from identity_client.admin import _convert_revocations as convert
from identity_client.admin._calls import PAGE_SIZE, call, pages
from identity_client.admin._convert import reason_to_wire, time_to_wire
from identity_client.admin.revocation_values import (
    LONGEST_WAIT,
    Hold,
    HoldTerms,
    Lifted,
    Revocation,
    RevocationPlan,
    RevocationStatus,
    Revoked,
    Subject,
)
from identity_client.admin.values import RevocationReason
from identity_client.errors import BrokerUnavailable

_MARGIN = 5.0  # seconds, for the answer itself after a wait
_PAUSE = 0.2  # seconds before what was lost is sent again
_MOST_PAUSE = 2.0


class Revocations:
    """Revoking, and who has heard of it."""

    def __init__(self, channel: grpc.Channel, timeout: float) -> None:
        self._stub = revocation_pb2_grpc.RevocationStub(channel)
        self._timeout = timeout

    @staticmethod
    def new_id() -> str:
        """Return a random id for `revoke`, so that it is known before the call."""
        return f"rev-{secrets.token_hex(8)}"

    def plan(self, subject: Subject) -> RevocationPlan:
        """Say what revoking the subject would hit. Changes nothing.

        Raises:
            ObjectNotFound: SUBJECT_NOT_FOUND.
            RequestRejected: SUBJECT_INVALID, SPIFFE_ID_INVALID.
        """
        request = pb.PlanRevocationRequest(subject=convert.subject_to_wire(subject))
        return convert.plan_from_wire(call(self._stub.Plan, request, self._timeout))

    def revoke(
        self,
        subject: Subject,
        *,
        reason: RevocationReason = RevocationReason.UNSPECIFIED,
        comment: str = "",
        revocation_id: str = "",
        hold: HoldTerms | None = None,
        without_hold: bool = False,
    ) -> Revoked:
        """Revoke. Durable when it returns; tried once more if the broker did not answer.

        Args:
            revocation_id: makes a repeat the same revocation, as long as its subject, reason and
                hold are the same; a random one when empty.
            hold: how the hold that comes with it is called and when it ends.
            without_hold: stop no issuance.

        Raises:
            ObjectNotFound: SUBJECT_NOT_FOUND.
            RequestRejected: SUBJECT_INVALID, SPIFFE_ID_INVALID.
            Conflict: HOLD_EXISTS; REVOCATION_EXISTS: the id is another's, or its hold is over.
            BrokerUnavailable: it is not known whether it was stored: call again with the same id.
        """
        request = pb.RevokeRequest(
            id=revocation_id or self.new_id(),
            subject=convert.subject_to_wire(subject),
            reason=reason_to_wire(reason),
            comment=comment,
            hold=pb.HoldRequest(name=hold.name, until=time_to_wire(hold.until)) if hold else None,
            without_hold=without_hold,
        )
        lost_one = False
        try:
            answer = call(self._stub.Revoke, request, self._timeout)
        except BrokerUnavailable as lost:
            lost_one = True
            threading.Event().wait(min(lost.retry_after or _PAUSE, _MOST_PAUSE))
            answer = call(self._stub.Revoke, request, self._timeout)
        return Revoked(
            revocation=convert.revocation_from_wire(answer.revocation),
            revoked_ids=tuple(answer.revoked_ids),
            repeated=answer.repeated and not lost_one,
        )

    def get(self, revocation_id: str, *, wait: timedelta = timedelta()) -> RevocationStatus:
        """Return a revocation and who has heard of it.

        Args:
            wait: how long to wait until every connected verifier has acknowledged it; at most 30 s.

        Raises:
            ObjectNotFound: REVOCATION_NOT_FOUND.
        """
        wait = min(max(wait, timedelta()), LONGEST_WAIT)
        request = pb.GetRevocationRequest(
            id=revocation_id, wait_ms=round(wait / timedelta(milliseconds=1))
        )
        timeout = max(self._timeout, wait.total_seconds() + _MARGIN)
        answer = call(self._stub.Get, request, timeout)
        return RevocationStatus(
            revocation=convert.revocation_from_wire(answer.revocation),
            propagation=convert.propagation_from_wire(answer.propagation),
            statement=answer.statement,
        )

    def list(self) -> Iterator[Revocation]:
        """Iterate over the revocations, newest first."""

        def fetch(token: str) -> pb.ListRevocationsResponse:
            request = pb.ListRevocationsRequest(page_size=PAGE_SIZE, page_token=token)
            return call(self._stub.List, request, self._timeout)

        for page in pages(fetch):
            yield from map(convert.revocation_from_wire, page.revocations)

    def holds(self, *, include_lifted: bool = False) -> Iterator[Hold]:
        """Iterate over the holds, newest first."""

        def fetch(token: str) -> pb.ListHoldsResponse:
            request = pb.ListHoldsRequest(
                page_size=PAGE_SIZE, page_token=token, include_lifted=include_lifted
            )
            return call(self._stub.ListHolds, request, self._timeout)

        for page in pages(fetch):
            yield from map(convert.hold_from_wire, page.holds)

    def lift(self, name: str) -> Lifted:
        """Lift a hold; one that is lifted already stays so.

        Raises:
            ObjectNotFound: HOLD_NOT_FOUND.
        """
        answer = call(self._stub.LiftHold, pb.LiftHoldRequest(name=name), self._timeout)
        return Lifted(
            hold=convert.hold_from_wire(answer.hold),
            released=answer.released,
            freed_entry_ids=tuple(answer.freed_entry_ids),
        )
