"""Rows of orders, holds, keys and epochs to domain values and back, as `mapping` does it."""

from __future__ import annotations

from typing import Any

from identity_broker.domain.credential import RevocationReason
from identity_broker.domain.revocation import (
    BlockedKey,
    Hold,
    IdentityEpoch,
    OrderState,
    RevocationOrder,
    RevocationSubject,
    SubjectKind,
)
from identity_broker.store.mapping import (
    Values,
    from_micros,
    optional_instant,
    optional_micros,
    spiffe_id_from,
    to_micros,
)


def order_values(order: RevocationOrder) -> Values:
    """The columns of an order but its number."""
    return {
        "id": order.id,
        "kind": order.subject.kind.value,
        "value": order.subject.value,
        "reason": int(order.reason),
        "comment": order.comment,
        "actor": order.actor,
        "ordered_at": to_micros(order.ordered_at),
        "state": order.state.value,
        "committed_at": optional_micros(order.committed_at),
        "revoked": order.revoked,
        "already_revoked": order.already_revoked,
        "expired": order.expired,
        "released": order.released,
        "hold": order.hold,
        "sequence": order.sequence,
        "swept": order.swept,
        "statement": order.statement,
    }


def order_from_row(row: Any) -> RevocationOrder:
    """The order of a row of `revocation_orders`."""
    return RevocationOrder(
        id=row.id,
        subject=RevocationSubject(SubjectKind(row.kind), row.value),
        reason=RevocationReason(row.reason),
        comment=row.comment,
        actor=row.actor,
        ordered_at=from_micros(row.ordered_at),
        state=OrderState(row.state),
        committed_at=optional_instant(row.committed_at),
        revoked=row.revoked,
        already_revoked=row.already_revoked,
        expired=row.expired,
        released=row.released,
        hold=row.hold,
        sequence=row.sequence,
        swept=bool(row.swept),
        statement=row.statement,
    )


def hold_values(hold: Hold) -> Values:
    """The columns of a hold but its number."""
    return {
        "name": hold.name,
        "kind": hold.subject.kind.value,
        "value": hold.subject.value,
        "order_id": hold.order_id,
        "reason": int(hold.reason),
        "actor": hold.actor,
        "created_at": to_micros(hold.created_at),
        "until": optional_micros(hold.until),
        "lifted_at": optional_micros(hold.lifted_at),
        "lifted_by": hold.lifted_by,
    }


def hold_from_row(row: Any) -> Hold:
    """The hold of a row of `holds`."""
    return Hold(
        name=row.name,
        subject=RevocationSubject(SubjectKind(row.kind), row.value),
        order_id=row.order_id,
        reason=RevocationReason(row.reason),
        actor=row.actor,
        created_at=from_micros(row.created_at),
        until=optional_instant(row.until),
        lifted_at=optional_instant(row.lifted_at),
        lifted_by=row.lifted_by,
    )


def blocked_key_values(key: BlockedKey) -> Values:
    """The columns of a blocked key."""
    return {
        "fingerprint": key.fingerprint,
        "order_id": key.order_id,
        "reason": int(key.reason),
        "blocked_at": to_micros(key.blocked_at),
    }


def blocked_key_from_row(row: Any) -> BlockedKey:
    """The key of a row of `blocked_keys`."""
    return BlockedKey(
        fingerprint=row.fingerprint,
        order_id=row.order_id,
        reason=RevocationReason(row.reason),
        blocked_at=from_micros(row.blocked_at),
    )


def epoch_values(epoch: IdentityEpoch) -> Values:
    """The columns of an epoch."""
    return {
        "spiffe_id": str(epoch.spiffe_id),
        "not_before": to_micros(epoch.not_before),
        "expires_at": to_micros(epoch.expires_at),
    }


def epoch_from_row(row: Any) -> IdentityEpoch:
    """The epoch of a row of `identity_epochs`."""
    return IdentityEpoch(
        spiffe_id=spiffe_id_from(row.spiffe_id),
        not_before=from_micros(row.not_before),
        expires_at=from_micros(row.expires_at),
    )
