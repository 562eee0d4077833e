"""Rows to domain values and back: pure, and the only place that knows how a value is stored.

- `*_values` gives the columns of a row, `*_from_row` the value: one undoes the other.
- Instants must be timezone-aware; they come back in UTC.
- A row that is not a valid domain value raises what the domain raises: nothing is guessed.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from identity_broker.domain.credential import (
    Credential,
    CredentialIntent,
    CredentialKind,
    CredentialState,
    Revocation,
    RevocationReason,
)
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.events import AuditEvent, AuditKind, Change, Topic
from identity_broker.domain.node import JoinToken, Node
from identity_broker.domain.selector import Selector
from identity_broker.store import tables
from identity_ca.authority import Authority, AuthorityKind, AuthorityState
from identity_ca.keys import KeyAlgorithm
from identity_ca.spiffe_id import SpiffeId, TrustDomain

Values = dict[str, Any]
"""Column name to column value."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NO_LABELS: Mapping[str, str] = MappingProxyType({})


# --- single values --------------------------------------------------------------------------------


def to_micros(instant: datetime) -> int:
    """Microseconds since the epoch.

    Raises:
        TypeError: the instant has no time zone.
    """
    since = instant - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def from_micros(micros: int) -> datetime:
    """The instant, in UTC."""
    return _EPOCH + timedelta(microseconds=micros)


def optional_micros(instant: datetime | None) -> int | None:
    """Microseconds since the epoch; None for none."""
    return None if instant is None else to_micros(instant)


def optional_instant(micros: int | None) -> datetime | None:
    """The instant, in UTC; None for none."""
    return None if micros is None else from_micros(micros)


def _span_to_micros(span: timedelta | None) -> int | None:
    return None if span is None else span // timedelta(microseconds=1)


def _span_from_micros(micros: int | None) -> timedelta | None:
    return None if micros is None else timedelta(microseconds=micros)


def _to_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False)


def _ders_to_text(ders: Iterable[bytes]) -> str:
    return _to_json([b64encode(der).decode("ascii") for der in ders])


def _ders_from_text(text: str) -> tuple[bytes, ...]:
    return tuple(b64decode(item) for item in json.loads(text))


# Parents, nodes and selectors repeat in thousands of rows; parsing them once is what makes loading
# 100,000 entries a matter of seconds, and sharing the values saves the memory.
@lru_cache(maxsize=16_384)
def spiffe_id_from(text: str) -> SpiffeId:
    """The SPIFFE ID, shared with other rows."""
    return SpiffeId.parse(text)


@lru_cache(maxsize=65_536)
def selector_from(kind: str, value: str) -> Selector:
    """The selector, shared with other rows."""
    return Selector(kind, value)


def _digest(*parts: str) -> str:
    # JSON keeps the parts apart whatever they hold.
    return hashlib.sha256(_to_json(parts).encode("utf-8", "surrogatepass")).hexdigest()


# --- entries --------------------------------------------------------------------------------------


def identity_key(entry: RegistrationEntry) -> str:
    """SHA-256 (hex) of what may be registered once: SPIFFE ID, parent and selector set."""
    selectors = sorted(str(selector) for selector in entry.selectors)
    return _digest(str(entry.spiffe_id), str(entry.parent_id), *selectors)


def hint_key(entry: RegistrationEntry) -> str | None:
    """SHA-256 (hex) of parent and hint, which may be registered once; None without a hint."""
    return _digest(str(entry.parent_id), entry.hint) if entry.hint else None


def entry_values(entry: RegistrationEntry) -> Values:
    """The columns of an entry that has its revision and times; selectors apart.

    Raises:
        TypeError: `created_at` or `updated_at` is not set.
    """
    if entry.created_at is None or entry.updated_at is None:
        raise TypeError("an entry is stored with the times of its making and last change")
    return {
        "id": entry.id,
        "spiffe_id": str(entry.spiffe_id),
        "parent_id": str(entry.parent_id),
        "identity_key": identity_key(entry),
        "x509_ttl": _span_to_micros(entry.x509_ttl),
        "jwt_ttl": _span_to_micros(entry.jwt_ttl),
        "dns_names": _to_json(entry.dns_names),
        "hint": entry.hint,
        "hint_key": hint_key(entry),
        "federates_with": _to_json([domain.name for domain in entry.federates_with]),
        "admin": entry.admin,
        "downstream": entry.downstream,
        "disabled": entry.disabled,
        "expires_at": optional_micros(entry.expires_at),
        "owner": entry.owner,
        "labels": _to_json(dict(entry.labels)),
        "per_process": entry.per_process,
        "key_algorithm": "" if entry.key_algorithm is None else entry.key_algorithm.value,
        "held_by": entry.held_by,
        "revision": entry.revision,
        "created_at": to_micros(entry.created_at),
        "updated_at": to_micros(entry.updated_at),
    }


def selector_values(entry: RegistrationEntry) -> list[Values]:
    """The rows of an entry's selectors."""
    return [
        {"entry_id": entry.id, "type": selector.type, "value": selector.value}
        for selector in sorted(entry.selectors)
    ]


def entry_from_row(row: Any, selectors: Iterable[Selector]) -> RegistrationEntry:
    """The entry of a row of `entries` and its selectors."""
    return RegistrationEntry(
        id=row.id,
        spiffe_id=spiffe_id_from(row.spiffe_id),
        parent_id=spiffe_id_from(row.parent_id),
        selectors=frozenset(selectors),
        x509_ttl=_span_from_micros(row.x509_ttl),
        jwt_ttl=_span_from_micros(row.jwt_ttl),
        dns_names=() if row.dns_names == "[]" else tuple(json.loads(row.dns_names)),
        hint=row.hint,
        federates_with=()
        if row.federates_with == "[]"
        else tuple(TrustDomain(name) for name in json.loads(row.federates_with)),
        admin=bool(row.admin),
        downstream=bool(row.downstream),
        disabled=bool(row.disabled),
        expires_at=optional_instant(row.expires_at),
        owner=row.owner,
        labels=_NO_LABELS if row.labels == "{}" else MappingProxyType(json.loads(row.labels)),
        per_process=bool(row.per_process),
        key_algorithm=KeyAlgorithm(row.key_algorithm) if row.key_algorithm else None,
        held_by=row.held_by,
        revision=row.revision,
        created_at=from_micros(row.created_at),
        updated_at=from_micros(row.updated_at),
    )


# --- nodes and join tokens ------------------------------------------------------------------------


def node_values(node: Node) -> Values:
    """The columns of a node."""
    return {
        "spiffe_id": str(node.spiffe_id),
        "attestor": node.attestor,
        "selectors": _to_json([[s.type, s.value] for s in sorted(node.selectors)]),
        "attested_at": to_micros(node.attested_at),
        "serial": node.serial,
        "expires_at": to_micros(node.expires_at),
        "reattestable": node.reattestable,
        "banned": node.banned,
        "ban_reason": node.ban_reason,
    }


def node_from_row(row: Any) -> Node:
    """The node of a row of `nodes`."""
    return Node(
        spiffe_id=spiffe_id_from(row.spiffe_id),
        attestor=row.attestor,
        selectors=frozenset(
            selector_from(kind, value) for kind, value in json.loads(row.selectors)
        ),
        attested_at=from_micros(row.attested_at),
        serial=row.serial,
        expires_at=from_micros(row.expires_at),
        reattestable=bool(row.reattestable),
        banned=bool(row.banned),
        ban_reason=row.ban_reason,
    )


def join_token_values(token: JoinToken) -> Values:
    """The columns of a join token."""
    return {
        "token_hash": token.token_hash,
        "node_id": str(token.node_id),
        "expires_at": to_micros(token.expires_at),
        "created_at": to_micros(token.created_at),
        "used_at": optional_micros(token.used_at),
    }


def join_token_from_row(row: Any) -> JoinToken:
    """The token of a row of `join_tokens`."""
    return JoinToken(
        token_hash=row.token_hash,
        node_id=spiffe_id_from(row.node_id),
        expires_at=from_micros(row.expires_at),
        created_at=from_micros(row.created_at),
        used_at=optional_instant(row.used_at),
    )


# --- the ledger -----------------------------------------------------------------------------------

INTENT_COLUMNS = (
    "id",
    "kind",
    "spiffe_id",
    "entry_id",
    "entry_revision",
    "node_id",
    "authority_id",
    "key_fingerprint",
    "tbs_digest",
    "not_before",
    "not_after",
    "recorded_at",
    "correlation_id",
    "instance",
)


def intent_row(intent: CredentialIntent) -> tuple[Any, ...]:
    """The columns of an intent, in the order of `INTENT_COLUMNS`.

    A tuple, not a mapping: one is made for every credential, on the event loop's thread.
    """
    node_id = intent.node_id
    return (
        intent.id,
        intent.kind.value,
        str(intent.spiffe_id),
        intent.entry_id,
        intent.entry_revision,
        None if node_id is None else str(node_id),
        intent.authority_id,
        intent.key_fingerprint,
        intent.tbs_digest,
        to_micros(intent.not_before),
        to_micros(intent.not_after),
        to_micros(intent.recorded_at),
        intent.correlation_id,
        intent.instance,
    )


def credential_values(credential: Credential) -> Values:
    """The columns of a ledger row but its number."""
    return {
        **dict(zip(INTENT_COLUMNS, intent_row(credential.intent), strict=True)),
        "state": credential.state.value,
        "digest": credential.digest,
        "revoked_at": optional_micros(credential.revoked_at),
        "reason": None if credential.reason is None else int(credential.reason),
        "comment": credential.comment,
        "order_id": credential.order_id,
    }


def credential_from_row(row: Any) -> Credential:
    """The credential of a row of `credentials`."""
    return Credential(
        intent=CredentialIntent(
            id=row.id,
            kind=CredentialKind(row.kind),
            spiffe_id=spiffe_id_from(row.spiffe_id),
            entry_id=row.entry_id,
            entry_revision=row.entry_revision,
            node_id=None if row.node_id is None else spiffe_id_from(row.node_id),
            authority_id=row.authority_id,
            key_fingerprint=row.key_fingerprint,
            tbs_digest=row.tbs_digest,
            not_before=from_micros(row.not_before),
            not_after=from_micros(row.not_after),
            recorded_at=from_micros(row.recorded_at),
            correlation_id=row.correlation_id,
            instance=row.instance,
        ),
        state=CredentialState(row.state),
        digest=row.digest,
        revoked_at=optional_instant(row.revoked_at),
        reason=None if row.reason is None else RevocationReason(row.reason),
        comment=row.comment,
        order_id=row.order_id,
    )


REVOCATION_COLUMNS = (
    tables.credentials.c.id,
    tables.credentials.c.kind,
    tables.credentials.c.spiffe_id,
    tables.credentials.c.revoked_at,
    tables.credentials.c.not_after,
    tables.credentials.c.reason,
    tables.credentials.c.comment,
    tables.credentials.c.authority_id,
    tables.credentials.c.entry_id,
    tables.credentials.c.node_id,
    tables.credentials.c.instance,
    tables.credentials.c.singled_out,
)


def revocation_from_row(row: Any) -> Revocation:
    """The revocation in a revoked row of `credentials` (`REVOCATION_COLUMNS`)."""
    return Revocation(
        id=row.id,
        kind=CredentialKind(row.kind),
        spiffe_id=spiffe_id_from(row.spiffe_id),
        revoked_at=from_micros(row.revoked_at),
        expires_at=from_micros(row.not_after),
        reason=RevocationReason(row.reason),
        comment=row.comment,
        authority_id=row.authority_id,
        entry_id=row.entry_id,
        node_id=None if row.node_id is None else spiffe_id_from(row.node_id),
        instance=row.instance,
        singled_out=bool(row.singled_out),
    )


# --- authorities ----------------------------------------------------------------------------------


def authority_values(authority: Authority, position: int) -> Values:
    """The columns of an authority that stands at `position` among its kind."""
    return {
        "id": authority.id,
        "kind": authority.kind.value,
        "position": position,
        "state": authority.state.value,
        "key_id": authority.key_id,
        "algorithm": authority.algorithm.value,
        "public_key_der": authority.public_key_der,
        "chain": _ders_to_text(authority.chain),
        "roots": _ders_to_text(authority.roots),
        "upstream": authority.upstream,
        "created_at": to_micros(authority.created_at),
        "not_before": to_micros(authority.not_before),
        "not_after": to_micros(authority.not_after),
    }


def authority_from_row(row: Any) -> Authority:
    """The authority of a row of `authorities`."""
    return Authority(
        id=row.id,
        kind=AuthorityKind(row.kind),
        state=AuthorityState(row.state),
        key_id=row.key_id,
        algorithm=KeyAlgorithm(row.algorithm),
        public_key_der=bytes(row.public_key_der),
        chain=_ders_from_text(row.chain),
        roots=_ders_from_text(row.roots),
        upstream=row.upstream,
        created_at=from_micros(row.created_at),
        not_before=from_micros(row.not_before),
        not_after=from_micros(row.not_after),
    )


# --- audit and outbox -----------------------------------------------------------------------------


def audit_values(event: AuditEvent) -> Values:
    """The columns of an audit event."""
    return {
        "at": to_micros(event.at),
        "kind": event.kind.value,
        "actor": event.actor,
        "subject": event.subject,
        "reason": event.reason,
        "correlation_id": event.correlation_id,
        "facts": _to_json(dict(event.facts)),
    }


def audit_from_row(row: Any) -> AuditEvent:
    """The event of a row of `audit_events`."""
    return AuditEvent(
        at=from_micros(row.at),
        kind=AuditKind(row.kind),
        actor=row.actor,
        subject=row.subject,
        reason=row.reason,
        correlation_id=row.correlation_id,
        facts=MappingProxyType(json.loads(row.facts)),
    )


def change_from_row(row: Any) -> Change:
    """The change of a row of `outbox`."""
    return Change(seq=row.seq, topic=Topic(row.topic), key=row.key)
