"""Revocations, holds and acknowledgements: the API's messages to values and back.

- Enum members are matched by name; one of a newer broker reads as UNKNOWN.
"""

from __future__ import annotations

from collections.abc import Mapping

from identity_api.broker.v1 import revocation_pb2 as pb
from identity_client.admin import revocation_values as values
from identity_client.admin._convert import (
    reason_from_wire,
    time_from_wire,
    time_from_wire_ms,
)

SUBJECT_KINDS: Mapping[int, values.SubjectKind] = {
    pb.SubjectKind.Value(f"SUBJECT_KIND_{kind.name}"): kind
    for kind in values.SubjectKind
    if kind is not values.SubjectKind.UNKNOWN
}
STATES: Mapping[int, values.RevocationState] = {
    pb.RevocationState.Value(f"REVOCATION_STATE_{state.name}"): state
    for state in values.RevocationState
    if state is not values.RevocationState.UNKNOWN
}
VERIFIER_STATES: Mapping[int, values.VerifierState] = {
    pb.VerifierState.Value(f"VERIFIER_STATE_{state.name}"): state
    for state in values.VerifierState
    if state is not values.VerifierState.UNKNOWN
}


def subject_to_wire(subject: values.Subject) -> pb.RevocationSubject:
    """What is revoked; a kind that is not known is left to the broker to refuse."""
    known = subject.kind is not values.SubjectKind.UNKNOWN
    name = subject.kind.name if known else "UNSPECIFIED"
    return pb.RevocationSubject(
        kind=pb.SubjectKind.Value(f"SUBJECT_KIND_{name}"), value=subject.value
    )


def subject_from_wire(message: pb.RevocationSubject) -> values.Subject:
    """What is revoked."""
    kind = SUBJECT_KINDS.get(message.kind, values.SubjectKind.UNKNOWN)
    return values.Subject(kind, message.value)


def plan_from_wire(message: pb.PlanRevocationResponse) -> values.RevocationPlan:
    """What revoking would hit."""
    return values.RevocationPlan(
        subject=subject_from_wire(message.subject),
        live_x509=message.live_x509,
        live_jwt=message.live_jwt,
        already_revoked=message.already_revoked,
        expired=message.expired,
        identities=tuple(
            values.IdentityCount(spiffe_id=one.spiffe_id, live=one.live)
            for one in message.identities
        ),
        identity_count=message.identity_count,
        held_entry_ids=tuple(message.held_entry_ids),
        held_entry_count=message.held_entry_count,
        nodes=tuple(
            values.NodeConcerned(spiffe_id=one.spiffe_id, connected=one.connected)
            for one in message.nodes
        ),
        node_count=message.node_count,
        connected_verifiers=message.connected_verifiers,
        callers_known=message.callers_known,
        callers=tuple(message.callers),
        holds=message.holds,
        blocked_keys=tuple(message.blocked_keys),
        stranded_node_ids=tuple(message.stranded_node_ids),
        stranded_node_count=message.stranded_node_count,
    )


def revocation_from_wire(message: pb.RevocationRecord) -> values.Revocation:
    """One revocation."""
    return values.Revocation(
        id=message.id,
        subject=subject_from_wire(message.subject),
        reason=reason_from_wire(message.reason),
        comment=message.comment,
        actor=message.actor,
        state=STATES.get(message.state, values.RevocationState.UNKNOWN),
        ordered_at=time_from_wire_ms(message.ordered_at_ms),
        committed_at=time_from_wire_ms(message.committed_at_ms),
        revoked=message.revoked,
        already_revoked=message.already_revoked,
        expired=message.expired,
        released=message.released,
        hold=message.hold,
        held_entry_ids=tuple(message.held_entry_ids),
        sequence=message.sequence,
    )


def propagation_from_wire(message: pb.Propagation) -> values.Propagation:
    """Who has heard of a revocation."""
    measured = message.acknowledged > 0 and message.p50_ms >= 0
    return values.Propagation(
        verifiers=tuple(map(verifier_from_wire, message.verifiers)),
        told=message.told,
        acknowledged=message.acknowledged,
        silent=message.silent,
        gone=message.gone,
        away=message.away,
        p50_ms=message.p50_ms if measured else None,
        p99_ms=message.p99_ms if measured else None,
        within_objective_permille=message.within_objective_permille
        if message.within_objective_permille >= 0
        else None,
    )


def verifier_from_wire(message: pb.VerifierRecord) -> values.Verifier:
    """One verifier."""
    state = VERIFIER_STATES.get(message.state, values.VerifierState.UNKNOWN)
    heard = state is values.VerifierState.ACKNOWLEDGED and message.latency_ms >= 0
    return values.Verifier(
        name=message.name,
        kind=message.kind,
        state=state,
        acknowledged_at=time_from_wire_ms(message.acknowledged_at_ms),
        latency_ms=message.latency_ms if heard else None,
        node_id=message.node_id,
    )


def hold_from_wire(message: pb.HoldRecord) -> values.Hold:
    """One hold."""
    return values.Hold(
        name=message.name,
        subject=subject_from_wire(message.subject),
        revocation_id=message.revocation_id,
        reason=reason_from_wire(message.reason),
        actor=message.actor,
        created_at=time_from_wire(message.created_at),
        until=time_from_wire(message.until),
        lifted_at=time_from_wire(message.lifted_at),
        lifted_by=message.lifted_by,
        held_entry_ids=tuple(message.held_entry_ids),
    )
