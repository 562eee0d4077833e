"""The API's messages to values and back.

- Enum members are matched by name, so that a number means the same thing on both sides.
- A time of 0 is None; a duration of 0 is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

from identity_api.broker.v1 import (
    authority_pb2,
    credential_pb2,
    entry_pb2,
    node_pb2,
    types_pb2,
)
from identity_client.admin import values
from identity_client.errors import ProtocolViolation

_EPOCH = datetime.fromtimestamp(0, UTC)


def time_from_wire(seconds: int) -> datetime | None:
    """Seconds since the epoch; 0 is None.

    Raises:
        ProtocolViolation: no calendar reaches that far.
    """
    if not seconds:
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, OSError, ValueError) as exc:
        raise ProtocolViolation(
            f"the broker answered a time that does not exist: {seconds}"
        ) from exc


def time_from_wire_ms(milliseconds: int) -> datetime | None:
    """Milliseconds since the epoch; 0 is None.

    Raises:
        ProtocolViolation: no calendar reaches that far.
    """
    seconds, rest = divmod(milliseconds, 1000)
    if not milliseconds:
        return None
    whole = time_from_wire(seconds) or _EPOCH
    return whole + timedelta(milliseconds=rest)


def time_to_wire(moment: datetime | None) -> int:
    """Whole seconds since the epoch; None is 0."""
    return 0 if moment is None else int(moment.timestamp())


def ttl_from_wire(seconds: int) -> timedelta | None:
    """A duration; 0 is None."""
    return timedelta(seconds=seconds) if seconds else None


def ttl_to_wire(ttl: timedelta | None) -> int:
    """Whole seconds, within what the field holds; None is 0."""
    if ttl is None:
        return 0
    return max(-(2**31), min(2**31 - 1, int(ttl.total_seconds())))


def selector_to_wire(text: str) -> types_pb2.Selector:
    """`type:value`; without a colon all of it is the type, which the broker refuses by name."""
    kind, _, value = text.partition(":")
    return types_pb2.Selector(type=kind, value=value)


def selectors_from_wire(selectors: Iterable[types_pb2.Selector]) -> tuple[str, ...]:
    """`type:value`, sorted, so that two answers of the same thing look the same."""
    return tuple(sorted(f"{item.type}:{item.value}" for item in selectors))


def entry_from_wire(entry: types_pb2.RegistrationEntry) -> values.Entry:
    """A registration entry."""
    return values.Entry(
        id=entry.id,
        spiffe_id=entry.spiffe_id,
        parent_id=entry.parent_id,
        selectors=selectors_from_wire(entry.selectors),
        x509_ttl=ttl_from_wire(entry.x509_ttl_seconds),
        jwt_ttl=ttl_from_wire(entry.jwt_ttl_seconds),
        dns_names=tuple(entry.dns_names),
        hint=entry.hint,
        federates_with=tuple(entry.federates_with),
        admin=entry.admin,
        downstream=entry.downstream,
        disabled=entry.disabled,
        expires_at=time_from_wire(entry.expires_at),
        owner=entry.owner,
        labels=MappingProxyType(dict(entry.labels)),
        per_process=entry.per_process,
        key_algorithm=entry.key_algorithm,
        held_by=entry.held_by,
        revision=entry.revision,
        created_at=time_from_wire(entry.created_at),
        updated_at=time_from_wire(entry.updated_at),
    )


def entry_to_wire(entry: values.Entry) -> types_pb2.RegistrationEntry:
    """A registration entry, without what only the broker sets."""
    return types_pb2.RegistrationEntry(
        id=entry.id,
        spiffe_id=entry.spiffe_id,
        parent_id=entry.parent_id,
        selectors=[selector_to_wire(text) for text in entry.selectors],
        x509_ttl_seconds=ttl_to_wire(entry.x509_ttl),
        jwt_ttl_seconds=ttl_to_wire(entry.jwt_ttl),
        dns_names=entry.dns_names,
        hint=entry.hint,
        federates_with=entry.federates_with,
        admin=entry.admin,
        downstream=entry.downstream,
        disabled=entry.disabled,
        expires_at=time_to_wire(entry.expires_at),
        owner=entry.owner,
        labels=entry.labels,
        per_process=entry.per_process,
        key_algorithm=entry.key_algorithm,
        revision=entry.revision,
    )


# Fields whose name on the wire differs from the value's.
WIRE_FIELDS: Mapping[str, str] = MappingProxyType(
    {"x509_ttl": "x509_ttl_seconds", "jwt_ttl": "jwt_ttl_seconds"}
)


def explanation_from_wire(found: entry_pb2.EntryExplanation) -> values.Explanation:
    """Why an entry would or would not be issued."""
    return values.Explanation(
        entry=entry_from_wire(found.entry),
        authorized=found.authorized,
        checks=tuple(
            values.Check(
                rule=check.rule, held=check.held, detail=check.detail, selector=check.selector
            )
            for check in found.checks
        ),
    )


def node_from_wire(node: node_pb2.NodeRecord) -> values.Node:
    """An attested node."""
    return values.Node(
        spiffe_id=node.spiffe_id,
        attestor=node.attestor,
        selectors=selectors_from_wire(node.selectors),
        attested_at=time_from_wire(node.attested_at),
        serial=node.serial,
        expires_at=time_from_wire(node.expires_at),
        banned=node.banned,
        ban_reason=node.ban_reason,
        reattestable=node.reattestable,
        svid_revoked=node.svid_revoked,
    )


def credential_from_wire(record: credential_pb2.CredentialRecord) -> values.Credential:
    """A ledger row."""
    revoked_at = time_from_wire(record.revoked_at)
    return values.Credential(
        id=record.id,
        kind=_KINDS.get(record.kind, values.CredentialKind.UNKNOWN),
        state=_STATES.get(record.state, values.CredentialState.UNKNOWN),
        spiffe_id=record.spiffe_id,
        entry_id=record.entry_id,
        entry_revision=record.entry_revision,
        node_id=record.node_id,
        authority_id=record.authority_id,
        key_fingerprint=record.key_fingerprint,
        tbs_digest=record.tbs_digest,
        digest=record.digest,
        not_before=time_from_wire(record.not_before),
        expires_at=time_from_wire(record.expires_at),
        recorded_at=time_from_wire(record.recorded_at),
        revoked_at=revoked_at,
        reason=reason_from_wire(record.reason) if revoked_at else None,
        comment=record.comment,
        instance=record.instance,
        revocation_id=record.revocation_id,
    )


def authority_from_wire(record: authority_pb2.AuthorityRecord) -> values.Authority:
    """A signing authority."""
    return values.Authority(
        id=record.id,
        kind=_AUTHORITY_KINDS.get(record.kind, values.AuthorityKind.UNKNOWN),
        state=_AUTHORITY_STATES.get(record.state, values.AuthorityState.UNKNOWN),
        key_id=record.key_id,
        algorithm=record.algorithm,
        not_before=time_from_wire(record.not_before),
        expires_at=time_from_wire(record.expires_at),
        certificate_chain=tuple(record.certificate_chain),
        roots=tuple(record.roots),
        public_key=record.public_key,
        upstream=record.upstream,
    )


def bundle_from_wire(bundle: types_pb2.TrustBundle) -> values.Bundle:
    """The trust domain's bundle."""
    return values.Bundle(
        trust_domain=bundle.trust_domain,
        x509_authorities=tuple(bundle.x509_authorities),
        jwt_keys=tuple(
            values.BundleJwtKey(
                key_id=key.key_id,
                public_key=key.public_key,
                expires_at=time_from_wire(key.expires_at),
            )
            for key in bundle.jwt_keys
        ),
        refresh_hint=timedelta(seconds=bundle.refresh_hint_seconds),
        sequence=bundle.sequence,
    )


_STATES: Mapping[int, values.CredentialState] = {
    credential_pb2.CredentialState.Value(f"CREDENTIAL_STATE_{state.name}"): state
    for state in values.CredentialState
    if state is not values.CredentialState.UNKNOWN
}
_KINDS: Mapping[int, values.CredentialKind] = {
    credential_pb2.CredentialKind.Value(f"CREDENTIAL_KIND_{kind.name}"): kind
    for kind in values.CredentialKind
    if kind is not values.CredentialKind.UNKNOWN
}
_REASONS: Mapping[int, values.RevocationReason] = {
    credential_pb2.RevocationReason.Value(f"REVOCATION_REASON_{reason.name}"): reason
    for reason in values.RevocationReason
}
_AUTHORITY_KINDS: Mapping[int, values.AuthorityKind] = {
    authority_pb2.AuthorityKind.Value(f"AUTHORITY_KIND_{kind.name}"): kind
    for kind in values.AuthorityKind
    if kind is not values.AuthorityKind.UNKNOWN
}
_AUTHORITY_STATES: Mapping[int, values.AuthorityState] = {
    authority_pb2.AuthorityState.Value(f"AUTHORITY_STATE_{state.name}"): state
    for state in values.AuthorityState
    if state is not values.AuthorityState.UNKNOWN
}


def reason_from_wire(number: int) -> values.RevocationReason:
    """A revocation reason; one we do not know reads as unspecified."""
    return _REASONS.get(number, values.RevocationReason.UNSPECIFIED)


def reason_to_wire(reason: values.RevocationReason) -> credential_pb2.RevocationReason.ValueType:
    """The number of a revocation reason."""
    return credential_pb2.RevocationReason.Value(f"REVOCATION_REASON_{reason.name}")


def state_to_wire(state: values.CredentialState) -> credential_pb2.CredentialState.ValueType:
    """The number of a credential state."""
    return credential_pb2.CredentialState.Value(_name("CREDENTIAL_STATE", state))


def kind_to_wire(
    kind: values.CredentialKind | None,
) -> credential_pb2.CredentialKind.ValueType:
    """The number of a credential kind; None means any."""
    return credential_pb2.CredentialKind.Value(_name("CREDENTIAL_KIND", kind))


def authority_kind_to_wire(
    kind: values.AuthorityKind | None,
) -> authority_pb2.AuthorityKind.ValueType:
    """The number of an authority kind; None means any."""
    return authority_pb2.AuthorityKind.Value(_name("AUTHORITY_KIND", kind))


def _name(
    prefix: str,
    member: values.CredentialState | values.CredentialKind | values.AuthorityKind | None,
) -> str:
    name = "UNSPECIFIED" if member is None or member.value == "unknown" else member.name
    return f"{prefix}_{name}"
