"""SVIDs, ledger rows and revoked credentials."""

from __future__ import annotations

from identity_api.broker.v1 import (
    credential_pb2,
    revocation_feed_pb2,
    types_pb2,
)
from identity_broker.domain.credential import (
    Credential,
    CredentialKind,
    CredentialState,
    Revocation,
    RevocationReason,
)
from identity_broker.domain.paging import (
    CredentialFilter,
)
from identity_broker.errors import (
    MalformedRequest,
)
from identity_broker.server.rpc.convert.scalars import (
    MAX_ID_BYTES,
    from_optional_spiffe_id,
    from_text,
    to_epoch,
)
from identity_ca.issuer import X509Credential
from identity_ca.jwt import JwtCredential
from identity_ca.spiffe_id import SpiffeId

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
        instance=intent.instance,
        revocation_id=credential.order_id,
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
        entry_id=from_text(request.entry_id, "entry_id", MAX_ID_BYTES),
        states=states,
        kind=kind,
    )


def to_revocation(
    revocation: Revocation, node_id: SpiffeId | None = None
) -> revocation_feed_pb2.RevokedCredential:
    """A revoked credential's message; to a node, with the instance that it is to deny."""
    instance = "" if node_id is None else revocation.denied_to(node_id)
    return revocation_feed_pb2.RevokedCredential(
        id=revocation.id,
        kind=_KINDS[revocation.kind],
        spiffe_id=str(revocation.spiffe_id),
        revoked_at=to_epoch(revocation.revoked_at),
        expires_at=to_epoch(revocation.expires_at),
        reason=to_reason(revocation.reason),
        entry_id=revocation.entry_id if instance else "",
        instance=instance,
        authority_id=revocation.authority_id,
    )
