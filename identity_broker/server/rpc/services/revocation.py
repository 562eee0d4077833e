"""Revocation: what would be hit, ending it, who has heard of it, and holds."""

from __future__ import annotations

from collections.abc import Mapping

from identity_api.broker.v1 import revocation_pb2 as pb
from identity_broker.domain.clock import Clock
from identity_broker.lifecycle.propagation import Propagation
from identity_broker.lifecycle.revoke import Revoke
from identity_broker.lifecycle.roster import Roster
from identity_broker.server.rpc.call import Call
from identity_broker.server.rpc.convert import revocations as convert
from identity_broker.server.rpc.convert import scalars
from identity_broker.server.rpc.pipeline import ServiceFunction
from identity_ca.spiffe_id import TrustDomain


class RevocationService:
    """Planning, ordering and following revocations, and lifting holds."""

    def __init__(
        self,
        revoke: Revoke,
        propagation: Propagation,
        roster: Roster,
        trust_domain: TrustDomain,
        clock: Clock,
    ) -> None:
        self._revoke = revoke
        self._propagation = propagation
        self._roster = roster
        self._trust_domain = trust_domain
        self._clock = clock

    def functions(self) -> Mapping[str, ServiceFunction]:
        """Full method name to service function."""
        service = "/identity_api.broker.v1.Revocation/"
        return {
            f"{service}Plan": self.plan,
            f"{service}Revoke": self.revoke,
            f"{service}Get": self.get,
            f"{service}List": self.list,
            f"{service}ListHolds": self.list_holds,
            f"{service}LiftHold": self.lift_hold,
        }

    async def plan(
        self, request: pb.PlanRevocationRequest, _call: Call
    ) -> pb.PlanRevocationResponse:
        """Say what revoking would hit."""
        wanted = convert.from_subject(request.subject, self._trust_domain, self._clock.now())
        plan = await self._revoke.plan(wanted)
        connected = [node for node in plan.count.node_ids if self._roster.of(node)]
        return convert.to_plan(plan, connected, self._propagation.connected)

    async def revoke(self, request: pb.RevokeRequest, call: Call) -> pb.RevokeResponse:
        """Revoke."""
        wanted = convert.from_revoke(request, self._trust_domain, self._clock.now())
        ordered = await self._revoke.order(wanted, call.caller)
        return pb.RevokeResponse(
            revocation=convert.to_record(ordered.order, ordered.held_entry_ids),
            revoked_ids=[one.id for one in ordered.revocations[: convert.MOST_REVOKED_IDS]],
            repeated=ordered.repeated,
        )

    async def get(self, request: pb.GetRevocationRequest, _call: Call) -> pb.GetRevocationResponse:
        """Return a revocation and who has heard of it."""
        wanted, wait = scalars.from_id(request.id, "id"), convert.from_wait(request.wait_ms)
        ordered = await self._revoke.get(wanted)
        if wait:
            await self._propagation.settled(ordered.order, wait)
            ordered = await self._revoke.get(wanted)
        return pb.GetRevocationResponse(
            revocation=convert.to_record(ordered.order, ordered.held_entry_ids),
            propagation=convert.to_propagation(await self._propagation.report(ordered.order)),
            statement=ordered.order.statement,
        )

    async def list(
        self, request: pb.ListRevocationsRequest, call: Call
    ) -> pb.ListRevocationsResponse:
        """Return a page of revocations, newest first."""
        scope = scalars.page_scope(call.method, request)
        page = await self._revoke.page(
            scalars.from_page_token(request.page_token, scope),
            scalars.from_page_size(request.page_size),
        )
        return pb.ListRevocationsResponse(
            revocations=[convert.to_record(order) for order in page.items],
            next_page_token=scalars.to_page_token(page.next_key, scope),
        )

    async def list_holds(self, request: pb.ListHoldsRequest, call: Call) -> pb.ListHoldsResponse:
        """Return a page of holds, newest first."""
        scope = scalars.page_scope(call.method, request)
        page = await self._revoke.holds(
            scalars.from_page_token(request.page_token, scope),
            scalars.from_page_size(request.page_size),
            include_lifted=request.include_lifted,
        )
        return pb.ListHoldsResponse(
            holds=[convert.to_hold(one.hold, one.held_entry_ids) for one in page.items],
            next_page_token=scalars.to_page_token(page.next_key, scope),
        )

    async def lift_hold(self, request: pb.LiftHoldRequest, call: Call) -> pb.LiftHoldResponse:
        """Lift a hold."""
        lifted = await self._revoke.lift(scalars.from_id(request.name, "name"), call.caller)
        return pb.LiftHoldResponse(
            hold=convert.to_hold(lifted.hold),
            released=lifted.released,
            freed_entry_ids=lifted.freed_entry_ids,
        )
