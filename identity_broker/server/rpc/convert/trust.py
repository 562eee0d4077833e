"""Bundles and authorities."""

from __future__ import annotations

from identity_api.broker.v1 import (
    authority_pb2,
    types_pb2,
)
from identity_broker.errors import (
    MalformedRequest,
)
from identity_broker.server.rpc.convert.scalars import to_epoch
from identity_ca.authority import Authority, AuthorityKind, AuthorityState
from identity_ca.bundle import TrustBundle

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
