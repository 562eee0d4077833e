"""Checks JWT-SVIDs that others send: by py-spiffe, and against what was revoked."""

from __future__ import annotations

from typing import Any

import jwt
from spiffe import JwtBundle, JwtSvid
from spiffe.errors import PySpiffeError

from identity_client.credential import IdentitySnapshot
from identity_client.errors import ObjectNotFound, PeerRejected, PeerRevoked
from identity_client.revocation import DenySet

__all__ = ["is_revoked", "verify_jwt_svid", "verify_with"]


def verify_with(
    snapshot: IdentitySnapshot, token: str, audience: str, *, denied: DenySet
) -> JwtSvid:
    """The token's claims, verified with the bundle of its subject's trust domain.

    Raises:
        PeerRejected: reason TOKEN_REJECTED: it does not verify, or its trust domain is neither
            ours nor federated with it (Workload API, section 6.3).
        PeerRevoked: it is revoked: by its jti, with its identity, or with the authority's key.
        RevocationsStale: nobody can say.
    """
    try:
        claimed = JwtSvid.parse_insecure(token, {audience}).spiffe_id.trust_domain
        bundle = snapshot.bundle_of(claimed).jwt_bundle
    except (PySpiffeError, ObjectNotFound) as exc:
        raise _rejected(exc) from None
    return verify_jwt_svid(token, audience, bundle=bundle, denied=denied)


def verify_jwt_svid(token: str, audience: str, *, bundle: JwtBundle, denied: DenySet) -> JwtSvid:
    """The token's claims, once signature, expiry, audience and revocation were checked.

    Raises:
        PeerRejected: reason TOKEN_REJECTED (JWT-SVID section 5).
        PeerRevoked: it is revoked: by its jti, with its identity, or with the authority's key.
        RevocationsStale: nobody can say.
    """
    try:
        svid = JwtSvid.parse_and_validate(token, bundle, {audience})
    except PySpiffeError as exc:
        raise _rejected(exc) from None
    if is_revoked(svid, denied):
        raise PeerRevoked(f'the JWT-SVID of "{svid.spiffe_id}" is revoked')
    denied.check_fresh()
    return svid


def is_revoked(svid: JwtSvid, denied: DenySet) -> bool:
    """Whether a JWT-SVID that was verified is revoked: by name, or with what it stands on."""
    claims = svid._claims  # noqa: SLF001 - py-spiffe keeps them and does not publish them
    return denied.denies_token(
        str(claims.get("jti", "")), str(svid.spiffe_id), _issued_at(claims), _key_id(svid.token)
    )


def _rejected(why: Exception) -> PeerRejected:
    # The class names the rule; never raised "from" it, because its words could quote the token.
    kind = type(why).__name__
    return PeerRejected(f"the JWT-SVID does not verify ({kind})", reason="TOKEN_REJECTED")


def _issued_at(claims: dict[str, Any]) -> float | None:
    found = claims.get("iat")
    if isinstance(found, bool) or not isinstance(found, (int, float)) or found != found:  # noqa: PLR0124 - NaN
        return None
    return found


def _key_id(token: str) -> str:
    try:
        return str(jwt.get_unverified_header(token).get("kid", ""))
    except jwt.PyJWTError:
        return ""  # It was not verified by its header, then.
