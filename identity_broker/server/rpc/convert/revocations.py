"""Revocations, what they would hit, and holds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta

from identity_api.broker.v1 import revocation_pb2 as pb
from identity_broker.domain.revocation import (
    MAX_SUBJECT_BYTES,
    Hold,
    OrderState,
    RevocationOrder,
    RevocationSubject,
    SubjectKind,
)
from identity_broker.domain.selection import subject
from identity_broker.errors import MalformedRequest
from identity_broker.lifecycle.plan import RevocationPlan
from identity_broker.lifecycle.propagation_report import PropagationReport, VerifierState
from identity_broker.lifecycle.revoke import OrderRequest
from identity_broker.server.rpc.convert.credentials import from_reason, to_reason
from identity_broker.server.rpc.convert.scalars import (
    MAX_ID_BYTES,
    from_epoch,
    from_text,
    to_epoch,
    to_epoch_ms,
)
from identity_ca.spiffe_id import SpiffeId, TrustDomain

LONGEST_WAIT_MS = 30_000
MOST_REVOKED_IDS = 1000
MOST_HELD = 100
MOST_VERIFIERS = 1000

_KINDS = {
    SubjectKind.SPIFFE_ID: pb.SUBJECT_KIND_SPIFFE_ID,
    SubjectKind.SERIAL: pb.SUBJECT_KIND_SERIAL,
    SubjectKind.JTI: pb.SUBJECT_KIND_JTI,
    SubjectKind.NODE: pb.SUBJECT_KIND_NODE,
    SubjectKind.ENTRY: pb.SUBJECT_KIND_ENTRY,
    SubjectKind.KEY_FINGERPRINT: pb.SUBJECT_KIND_KEY_FINGERPRINT,
    SubjectKind.AUTHORITY: pb.SUBJECT_KIND_AUTHORITY,
    SubjectKind.SELECT: pb.SUBJECT_KIND_SELECT,
}
_KINDS_BACK = {value: key for key, value in _KINDS.items()}
_STATES = {
    OrderState.RUNNING: pb.REVOCATION_STATE_RUNNING,
    OrderState.COMMITTED: pb.REVOCATION_STATE_COMMITTED,
    OrderState.CLOSED: pb.REVOCATION_STATE_CLOSED,
}
_VERIFIER_STATES = {
    VerifierState.ACKNOWLEDGED: pb.VERIFIER_STATE_ACKNOWLEDGED,
    VerifierState.SILENT: pb.VERIFIER_STATE_SILENT,
    VerifierState.GONE: pb.VERIFIER_STATE_GONE,
    VerifierState.AWAY: pb.VERIFIER_STATE_AWAY,
}


def from_subject(
    message: pb.RevocationSubject, trust_domain: TrustDomain, now: datetime
) -> RevocationSubject:
    """Parse what is revoked, into its canonical spelling.

    Raises:
        MalformedRequest: it is missing, too long or unprintable.
        SubjectInvalid, InvalidSpiffeId: it names nothing that can be revoked.
    """
    kind = _KINDS_BACK.get(message.kind)
    if kind is None:
        raise MalformedRequest("subject.kind is not one this broker knows")
    if not message.value:
        raise MalformedRequest("subject.value is required")
    value = from_text(message.value, "subject.value", MAX_SUBJECT_BYTES)
    return subject(kind, value, trust_domain=trust_domain, now=now)


def to_subject(found: RevocationSubject) -> pb.RevocationSubject:
    """What is revoked."""
    return pb.RevocationSubject(kind=_KINDS[found.kind], value=found.value)


def from_revoke(
    request: pb.RevokeRequest, trust_domain: TrustDomain, now: datetime
) -> OrderRequest:
    """Parse an order to revoke.

    Raises:
        MalformedRequest, SubjectInvalid, InvalidSpiffeId: naming the field.
    """
    return OrderRequest(
        subject=from_subject(request.subject, trust_domain, now),
        reason=from_reason(request.reason),
        comment=from_text(request.comment, "comment"),
        id=from_text(request.id, "id", MAX_ID_BYTES),
        hold_name=from_text(request.hold.name, "hold.name", MAX_ID_BYTES),
        hold_until=from_epoch(request.hold.until, "hold.until"),
        without_hold=request.without_hold,
    )


def from_wait(milliseconds: int) -> timedelta:
    """Parse how long to wait for acknowledgements.

    Raises:
        MalformedRequest: negative or longer than 30 s.
    """
    if not 0 <= milliseconds <= LONGEST_WAIT_MS:
        raise MalformedRequest(f"wait_ms must be between 0 and {LONGEST_WAIT_MS}")
    return timedelta(milliseconds=milliseconds)


def to_plan(
    plan: RevocationPlan, connected_nodes: Collection[SpiffeId], connected_verifiers: int
) -> pb.PlanRevocationResponse:
    """What revoking would hit."""
    count = plan.count
    return pb.PlanRevocationResponse(
        subject=to_subject(plan.subject),
        live_x509=count.live_x509,
        live_jwt=count.live_jwt,
        already_revoked=count.already_revoked,
        expired=count.expired,
        identities=[
            pb.PlanRevocationResponse.IdentityCount(spiffe_id=str(one.spiffe_id), live=one.live)
            for one in count.identities
        ],
        identity_count=count.identity_count,
        held_entry_ids=plan.held_entry_ids[:MOST_HELD],
        held_entry_count=plan.held_entry_count,
        nodes=[
            pb.PlanRevocationResponse.NodeConcerned(
                spiffe_id=str(node), connected=node in connected_nodes
            )
            for node in count.node_ids
        ],
        node_count=count.node_count,
        connected_verifiers=connected_verifiers,
        holds=plan.holds,
        blocked_keys=plan.blocked_keys,
        stranded_node_ids=map(str, plan.stranded_node_ids),
        stranded_node_count=plan.stranded_node_count,
    )


def to_record(order: RevocationOrder, held_entry_ids: Sequence[str] = ()) -> pb.RevocationRecord:
    """One revocation."""
    return pb.RevocationRecord(
        id=order.id,
        subject=to_subject(order.subject),
        reason=to_reason(order.reason),
        comment=order.comment,
        actor=order.actor,
        state=_STATES[order.state],
        ordered_at_ms=to_epoch_ms(order.ordered_at),
        committed_at_ms=to_epoch_ms(order.committed_at),
        revoked=order.revoked,
        already_revoked=order.already_revoked,
        expired=order.expired,
        hold=order.hold,
        held_entry_ids=held_entry_ids,
        sequence=order.sequence,
        released=order.released,
    )


def to_propagation(report: PropagationReport) -> pb.Propagation:
    """Who has heard of a revocation."""
    return pb.Propagation(
        verifiers=[
            pb.VerifierRecord(
                name=one.verifier.label,
                kind=one.verifier.kind.value,
                state=_VERIFIER_STATES[one.state],
                acknowledged_at_ms=to_epoch_ms(one.acknowledged_at),
                latency_ms=one.latency_ms,
                node_id=one.verifier.node_id,
            )
            for one in report.verifiers[:MOST_VERIFIERS]
        ],
        told=report.told,
        acknowledged=report.acknowledged,
        silent=report.silent,
        gone=report.gone,
        p50_ms=report.p50_ms,
        p99_ms=report.p99_ms,
        within_objective_permille=report.within_objective_permille,
        away=report.away,
    )


def to_hold(hold: Hold, held_entry_ids: Sequence[str] = ()) -> pb.HoldRecord:
    """One hold."""
    return pb.HoldRecord(
        name=hold.name,
        subject=to_subject(hold.subject),
        revocation_id=hold.order_id,
        reason=to_reason(hold.reason),
        actor=hold.actor,
        created_at=to_epoch(hold.created_at),
        until=to_epoch(hold.until),
        lifted_at=to_epoch(hold.lifted_at),
        lifted_by=hold.lifted_by,
        held_entry_ids=held_entry_ids[:MOST_HELD],
    )
