"""Registration entries and selectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MappingProxyType

from identity_api.broker.v1 import (
    entry_pb2,
    types_pb2,
)
from identity_broker.domain.entry import KEY_ALGORITHMS, RegistrationEntry
from identity_broker.domain.paging import (
    EntryFilter,
)
from identity_broker.domain.selector import Selector
from identity_broker.errors import (
    EntryInvalid,
    InvalidSpiffeId,
    MalformedRequest,
)
from identity_broker.lifecycle.authorize import Check
from identity_broker.server.rpc.convert.scalars import (
    from_epoch,
    from_optional_spiffe_id,
    from_seconds,
    from_spiffe_id,
    from_text,
    to_epoch,
)
from identity_ca.errors import SpiffeIdError
from identity_ca.keys import KeyAlgorithm
from identity_ca.spiffe_id import TrustDomain


def to_selector(selector: Selector) -> types_pb2.Selector:
    """A selector's message."""
    return types_pb2.Selector(type=selector.type, value=selector.value)


def from_selectors(selectors: Iterable[types_pb2.Selector]) -> frozenset[Selector]:
    """Parse selectors.

    Raises:
        EntryInvalid: one is malformed or listed twice.
    """
    parsed = [Selector(item.type, item.value) for item in selectors]
    unique = frozenset(parsed)
    if len(unique) != len(parsed):
        raise EntryInvalid("a selector is listed twice")
    return unique


def to_entry(entry: RegistrationEntry) -> types_pb2.RegistrationEntry:
    """A registration entry's message."""
    return types_pb2.RegistrationEntry(
        id=entry.id,
        spiffe_id=str(entry.spiffe_id),
        parent_id=str(entry.parent_id),
        selectors=[to_selector(selector) for selector in sorted(entry.selectors)],
        x509_ttl_seconds=int(entry.x509_ttl.total_seconds()) if entry.x509_ttl else 0,
        jwt_ttl_seconds=int(entry.jwt_ttl.total_seconds()) if entry.jwt_ttl else 0,
        dns_names=entry.dns_names,
        hint=entry.hint,
        federates_with=[str(domain) for domain in entry.federates_with],
        admin=entry.admin,
        downstream=entry.downstream,
        disabled=entry.disabled,
        expires_at=to_epoch(entry.expires_at),
        owner=entry.owner,
        labels=dict(entry.labels),
        per_process=entry.per_process,
        key_algorithm=entry.key_algorithm or "",
        held_by=entry.held_by,
        revision=entry.revision,
        created_at=to_epoch(entry.created_at),
        updated_at=to_epoch(entry.updated_at),
    )


def from_entry(message: types_pb2.RegistrationEntry, entry_id: str) -> RegistrationEntry:
    """Parse a registration entry, under the id given.

    Raises:
        MalformedRequest, InvalidSpiffeId, EntryInvalid: naming the field.
    """
    return RegistrationEntry(
        id=entry_id,
        spiffe_id=from_spiffe_id(message.spiffe_id, "spiffe_id"),
        parent_id=from_spiffe_id(message.parent_id, "parent_id"),
        selectors=from_selectors(message.selectors),
        x509_ttl=from_seconds(message.x509_ttl_seconds, "x509_ttl_seconds"),
        jwt_ttl=from_seconds(message.jwt_ttl_seconds, "jwt_ttl_seconds"),
        dns_names=tuple(message.dns_names),
        hint=message.hint,
        federates_with=tuple(_trust_domain(name) for name in message.federates_with),
        admin=message.admin,
        downstream=message.downstream,
        disabled=message.disabled,
        expires_at=from_epoch(message.expires_at, "expires_at"),
        owner=message.owner,
        labels=MappingProxyType(dict(message.labels)),
        per_process=message.per_process,
        key_algorithm=_key_algorithm(message.key_algorithm),
    )


# The API's field names, and the value's.
_FIELDS = {
    "x509_ttl_seconds": "x509_ttl",
    "jwt_ttl_seconds": "jwt_ttl",
}


def from_update(
    stored: RegistrationEntry, message: types_pb2.RegistrationEntry, fields: Sequence[str]
) -> RegistrationEntry:
    """Return the stored entry with the named fields taken from the message.

    Raises:
        MalformedRequest, InvalidSpiffeId, EntryInvalid: naming the field.
    """
    if not fields:
        raise MalformedRequest("fields must name at least one field to update")
    merged = to_entry(stored)
    known = types_pb2.RegistrationEntry.DESCRIPTOR.fields_by_name
    for field in fields:
        if field not in known:
            raise MalformedRequest(f"a registration entry has no field {field[:64]!r}")
        # Required fields stay readable, so that the parse below is about the named ones.
        merged.ClearField(field)  # type: ignore[arg-type]
    chosen = types_pb2.RegistrationEntry()
    chosen.CopyFrom(message)
    for field in known:
        if field not in fields:
            chosen.ClearField(field)  # type: ignore[arg-type]
    merged.MergeFrom(chosen)
    names = frozenset(_FIELDS.get(field, field) for field in fields)
    return stored.with_fields(from_entry(merged, stored.id), names)


def _key_algorithm(name: str) -> KeyAlgorithm | None:
    if not name:
        return None
    try:
        return KeyAlgorithm(name)
    except ValueError as error:
        raise EntryInvalid(
            f"key_algorithm {name[:32]!r} is not known",
            hint=f"key_algorithm is one of: {', '.join(KEY_ALGORITHMS)}",
        ) from error


def _trust_domain(name: str) -> TrustDomain:
    try:
        return TrustDomain.parse(name)
    except SpiffeIdError as error:
        raise InvalidSpiffeId(f"federates_with: {error.message}", hint=error.hint) from error


def from_entry_filter(request: entry_pb2.ListEntriesRequest) -> EntryFilter:
    """Parse what entries are wanted.

    Raises:
        MalformedRequest, InvalidSpiffeId, EntryInvalid: naming the field.
    """
    return EntryFilter(
        spiffe_id=from_optional_spiffe_id(request.spiffe_id, "spiffe_id"),
        parent_id=from_optional_spiffe_id(request.parent_id, "parent_id"),
        selectors=from_selectors(request.selectors),
        owner=from_text(request.owner, "owner"),
        hint=from_text(request.hint, "hint"),
    )


def to_check(check: Check) -> entry_pb2.EntryExplanation.Check:
    """An explained rule's message."""
    return entry_pb2.EntryExplanation.Check(
        rule=check.rule, held=check.held, detail=check.detail, selector=check.selector
    )
