"""Between the API's messages and the broker's values; the only place that does either.

- `to_*` makes messages, `from_*` parses them; parsing raises `RequestError`s that name the field.
- Nothing here touches the network, the store or a key.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

from identity_api.broker.v1 import (
    authority_pb2,
    credential_pb2,
    entry_pb2,
    node_pb2,
    types_pb2,
)
from identity_broker.domain.credential import (
    Credential,
    CredentialKind,
    CredentialState,
    Revocation,
    RevocationReason,
)
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.node import Node
from identity_broker.domain.paging import (
    DEFAULT_PAGE_SIZE,
    MAX_PAGE_SIZE,
    CredentialFilter,
    EntryFilter,
    NodeFilter,
)
from identity_broker.domain.selector import Selector
from identity_broker.errors import (
    EntryInvalid,
    InvalidSpiffeId,
    MalformedRequest,
    PageTokenInvalid,
)
from identity_broker.lifecycle.authorize import Check
from identity_ca.authority import Authority, AuthorityKind, AuthorityState
from identity_ca.bundle import TrustBundle
from identity_ca.errors import SpiffeIdError
from identity_ca.issuer import X509Credential
from identity_ca.jwt import JwtCredential
from identity_ca.spiffe_id import SpiffeId, TrustDomain

_MAX_EPOCH = 253402300799  # 9999-12-31T23:59:59Z: the last time X.509 can write
MAX_BATCH = 500
MAX_TEXT_BYTES = 512

_KINDS = {
    CredentialKind.X509: credential_pb2.CREDENTIAL_KIND_X509,
    CredentialKind.JWT: credential_pb2.CREDENTIAL_KIND_JWT,
}
_KINDS_BACK = {value: key for key, value in _KINDS.items()}
_STATES = {
    CredentialState.INTENT: credential_pb2.CREDENTIAL_STATE_INTENT,
    CredentialState.ISSUED: credential_pb2.CREDENTIAL_STATE_ISSUED,
    CredentialState.UNCONFIRMED: credential_pb2.CREDENTIAL_STATE_UNCONFIRMED,
    CredentialState.SUPERSEDED: credential_pb2.CREDENTIAL_STATE_SUPERSEDED,
    CredentialState.REVOKED: credential_pb2.CREDENTIAL_STATE_REVOKED,
    CredentialState.EXPIRED: credential_pb2.CREDENTIAL_STATE_EXPIRED,
}
_STATES_BACK = {value: key for key, value in _STATES.items()}
_AUTHORITY_KINDS = {
    AuthorityKind.X509: authority_pb2.AUTHORITY_KIND_X509,
    AuthorityKind.JWT: authority_pb2.AUTHORITY_KIND_JWT,
}
_AUTHORITY_KINDS_BACK = {value: key for key, value in _AUTHORITY_KINDS.items()}
_AUTHORITY_STATES = {
    AuthorityState.PREPARED: authority_pb2.AUTHORITY_STATE_PREPARED,
    AuthorityState.ACTIVE: authority_pb2.AUTHORITY_STATE_ACTIVE,
    AuthorityState.OLD: authority_pb2.AUTHORITY_STATE_OLD,
    AuthorityState.TAINTED: authority_pb2.AUTHORITY_STATE_TAINTED,
    AuthorityState.REVOKED: authority_pb2.AUTHORITY_STATE_REVOKED,
}


# --- scalars --------------------------------------------------------------------------------


def from_spiffe_id(text: str, field: str) -> SpiffeId:
    """Parse a required SPIFFE ID.

    Raises:
        MalformedRequest: it is missing.
        InvalidSpiffeId: it is not one.
    """
    if not text:
        raise MalformedRequest(f"{field} is required")
    try:
        return SpiffeId.parse(text)
    except SpiffeIdError as error:
        raise InvalidSpiffeId(f"{field}: {error.message}", hint=error.hint) from error


def from_optional_spiffe_id(text: str, field: str) -> SpiffeId | None:
    """Parse an optional SPIFFE ID.

    Raises:
        InvalidSpiffeId: it is not one.
    """
    return from_spiffe_id(text, field) if text else None


def from_text(text: str, field: str, most: int = MAX_TEXT_BYTES) -> str:
    """Check free text.

    Raises:
        MalformedRequest: too long or unprintable.
    """
    if len(text.encode()) > most or (text and not text.isprintable()):
        raise MalformedRequest(f"{field} is printable text of at most {most} bytes")
    return text


def from_seconds(seconds: int, field: str) -> timedelta | None:
    """Parse a duration; 0 is None.

    Raises:
        MalformedRequest: negative.
    """
    if seconds < 0:
        raise MalformedRequest(f"{field} must not be negative")
    return timedelta(seconds=seconds) if seconds else None


def from_epoch(seconds: int, field: str) -> datetime | None:
    """Parse a time; 0 is None.

    Raises:
        MalformedRequest: outside the years 1970 to 9999.
    """
    if not 0 <= seconds <= _MAX_EPOCH:
        raise MalformedRequest(f"{field} is outside the years 1970 to 9999")
    return datetime.fromtimestamp(seconds, UTC) if seconds else None


def to_epoch(at: datetime | None) -> int:
    """Seconds since the epoch; None is 0."""
    return int(at.timestamp()) if at else 0


def from_batch(items: Sequence[object], field: str) -> None:
    """Check the size of a batch.

    Raises:
        MalformedRequest: empty or too large.
    """
    if not 1 <= len(items) <= MAX_BATCH:
        raise MalformedRequest(f"{field} must hold 1 to {MAX_BATCH} items")


def from_page_size(size: int) -> int:
    """Return the page size to use.

    Raises:
        MalformedRequest: negative or too large.
    """
    if not 0 <= size <= MAX_PAGE_SIZE:
        raise MalformedRequest(f"page_size must be between 1 and {MAX_PAGE_SIZE}")
    return size or DEFAULT_PAGE_SIZE


def to_page_token(key: str) -> str:
    """Wrap a keyset position so that nobody builds on its form."""
    return base64.urlsafe_b64encode(b"1:" + key.encode()).decode() if key else ""


def from_page_token(token: str) -> str:
    """Unwrap a keyset position.

    Raises:
        PageTokenInvalid: not one of ours.
    """
    if not token:
        return ""
    try:
        raw = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True)
        text = raw.decode()
    except (ValueError, binascii.Error) as error:
        raise PageTokenInvalid from error
    version, _, key = text.partition(":")
    if version != "1" or not key or "\x00" in key:
        raise PageTokenInvalid
    return key


# --- entries --------------------------------------------------------------------------------


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


def _trust_domain(name: str) -> TrustDomain:
    try:
        return TrustDomain.parse(name)
    except SpiffeIdError as error:
        raise InvalidSpiffeId(f"federates_with: {error.message}", hint=error.hint) from error


def from_entry_filter(request: entry_pb2.ListEntriesRequest) -> EntryFilter:
    """Parse what entries are wanted.

    Raises:
        InvalidSpiffeId, EntryInvalid: naming the field.
    """
    return EntryFilter(
        spiffe_id=from_optional_spiffe_id(request.spiffe_id, "spiffe_id"),
        parent_id=from_optional_spiffe_id(request.parent_id, "parent_id"),
        selectors=from_selectors(request.selectors),
        owner=request.owner,
        hint=request.hint,
    )


def to_check(check: Check) -> entry_pb2.EntryExplanation.Check:
    """An explained rule's message."""
    return entry_pb2.EntryExplanation.Check(
        rule=check.rule, held=check.held, detail=check.detail, selector=check.selector
    )


# --- nodes ------------------------------------------------------------------------------------


def to_node(node: Node) -> node_pb2.NodeRecord:
    """A node's message."""
    return node_pb2.NodeRecord(
        spiffe_id=str(node.spiffe_id),
        attestor=node.attestor,
        selectors=[to_selector(selector) for selector in sorted(node.selectors)],
        attested_at=to_epoch(node.attested_at),
        serial=node.serial,
        expires_at=to_epoch(node.expires_at),
        banned=node.banned,
        ban_reason=node.ban_reason,
        reattestable=node.reattestable,
    )


def from_node_filter(request: node_pb2.ListNodesRequest) -> NodeFilter:
    """Parse what nodes are wanted.

    Raises:
        MalformedRequest: an unknown value.
    """
    wanted = {
        node_pb2.BANNED_FILTER_UNSPECIFIED: None,
        node_pb2.BANNED_FILTER_BANNED: True,
        node_pb2.BANNED_FILTER_NOT_BANNED: False,
    }
    if request.banned not in wanted:
        raise MalformedRequest("banned is not a value this broker knows")
    return NodeFilter(attestor=request.attestor, banned=wanted[request.banned])


# --- credentials ------------------------------------------------------------------------------


def fill_x509_svid(message: types_pb2.X509Svid, credential: X509Credential, hint: str) -> None:
    """Fill in an X.509-SVID's message, in place: a batch is not copied."""
    message.cert_chain.extend(credential.chain)
    message.spiffe_id = str(credential.spiffe_id)
    message.serial = credential.serial
    message.not_before = int(credential.not_before.timestamp())
    message.expires_at = int(credential.not_after.timestamp())
    message.hint = hint


def to_x509_svid(credential: X509Credential) -> types_pb2.X509Svid:
    """An X.509-SVID's message."""
    message = types_pb2.X509Svid()
    fill_x509_svid(message, credential, "")
    return message


def fill_jwt_svid(message: types_pb2.JwtSvid, credential: JwtCredential, hint: str) -> None:
    """Fill in a JWT-SVID's message, in place: a batch is not copied."""
    message.token = credential.token
    message.spiffe_id = str(credential.spiffe_id)
    message.jti = credential.jti
    message.issued_at = int(credential.not_before.timestamp())
    message.expires_at = int(credential.not_after.timestamp())
    message.hint = hint


def to_credential(credential: Credential) -> credential_pb2.CredentialRecord:
    """A ledger row's message."""
    intent = credential.intent
    return credential_pb2.CredentialRecord(
        id=intent.id,
        kind=_KINDS[intent.kind],
        state=_STATES[credential.state],
        spiffe_id=str(intent.spiffe_id),
        entry_id=intent.entry_id,
        entry_revision=intent.entry_revision,
        node_id=str(intent.node_id) if intent.node_id else "",
        authority_id=intent.authority_id,
        key_fingerprint=intent.key_fingerprint,
        tbs_digest=intent.tbs_digest,
        digest=credential.digest,
        not_before=to_epoch(intent.not_before),
        expires_at=to_epoch(intent.not_after),
        recorded_at=to_epoch(intent.recorded_at),
        revoked_at=to_epoch(credential.revoked_at),
        reason=to_reason(credential.reason),
        comment=credential.comment,
    )


def to_reason(reason: RevocationReason | None) -> credential_pb2.RevocationReason.ValueType:
    """A revocation reason's value on the wire; the numbers are RFC 5280's on both sides."""
    return credential_pb2.RevocationReason.ValueType(int(reason or 0))


def from_reason(value: int) -> RevocationReason:
    """Parse a revocation reason.

    Raises:
        MalformedRequest: not one this broker gives.
    """
    try:
        return RevocationReason(value)
    except ValueError as error:
        raise MalformedRequest("reason is not one this broker knows") from error


def from_credential_filter(request: credential_pb2.ListCredentialsRequest) -> CredentialFilter:
    """Parse what credentials are wanted.

    Raises:
        MalformedRequest, InvalidSpiffeId: naming the field.
    """
    try:
        states = frozenset(_STATES_BACK[state] for state in request.states)
        kind = _KINDS_BACK[request.kind] if request.kind else None
    except KeyError as error:
        raise MalformedRequest("states or kind is not a value this broker knows") from error
    return CredentialFilter(
        spiffe_id=from_optional_spiffe_id(request.spiffe_id, "spiffe_id"),
        node_id=from_optional_spiffe_id(request.node_id, "node_id"),
        entry_id=request.entry_id,
        states=states,
        kind=kind,
    )


def to_revocation(revocation: Revocation) -> credential_pb2.Revocation:
    """A revocation's message."""
    return credential_pb2.Revocation(
        id=revocation.id,
        kind=_KINDS[revocation.kind],
        spiffe_id=str(revocation.spiffe_id),
        revoked_at=to_epoch(revocation.revoked_at),
        expires_at=to_epoch(revocation.expires_at),
        reason=to_reason(revocation.reason),
    )


# --- trust ------------------------------------------------------------------------------------


def to_bundle(bundle: TrustBundle) -> types_pb2.TrustBundle:
    """A trust bundle's message."""
    return types_pb2.TrustBundle(
        trust_domain=str(bundle.trust_domain),
        x509_authorities=bundle.x509_authorities,
        jwt_keys=[
            types_pb2.JwtKey(
                key_id=key.key_id,
                public_key=key.public_key_der,
                expires_at=to_epoch(key.expires_at),
            )
            for key in bundle.jwt_keys
        ],
        refresh_hint_seconds=int(bundle.refresh_hint.total_seconds()) if bundle.refresh_hint else 0,
        sequence=bundle.sequence or 0,
    )


def to_authority(authority: Authority) -> authority_pb2.AuthorityRecord:
    """An authority's message."""
    return authority_pb2.AuthorityRecord(
        id=authority.id,
        kind=_AUTHORITY_KINDS[authority.kind],
        state=_AUTHORITY_STATES[authority.state],
        key_id=authority.key_id,
        algorithm=authority.algorithm.value,
        not_before=to_epoch(authority.not_before),
        expires_at=to_epoch(authority.not_after),
        certificate_chain=authority.chain,
        roots=authority.roots,
        public_key=authority.public_key_der,
        upstream=authority.upstream,
    )


def from_authority_kind(value: int) -> AuthorityKind | None:
    """Parse an authority kind; 0 is None.

    Raises:
        MalformedRequest: an unknown value.
    """
    if not value:
        return None
    try:
        return _AUTHORITY_KINDS_BACK[value]  # type: ignore[index]
    except KeyError as error:
        raise MalformedRequest("kind is not a value this broker knows") from error
