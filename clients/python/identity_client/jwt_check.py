"""Checks JWT-SVIDs that others send: by py-spiffe, and against what was revoked."""

from __future__ import annotations

from typing import Any

import jwt
from spiffe import JwtBundle, JwtSvid
from spiffe.errors import PySpiffeError

from identity_client.credential import IdentitySnapshot
from identity_client.errors import ObjectNotFound, PeerRejected, PeerRevoked
from identity_client.revocation import DenySet

__all__ = ["verify_jwt_svid", "verify_with"]


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
    name = str(svid.spiffe_id)
    claims = _claims(svid)
    if denied.denies_token(str(claims.get("jti", "")), name, _issued_at(claims), _key_id(token)):
        raise PeerRevoked(f'the JWT-SVID of "{name}" is revoked')
    denied.check_fresh()
    return svid


def _rejected(why: Exception) -> PeerRejected:
    # The class names the rule; never raised "from" it, because its words could quote the token.
    kind = type(why).__name__
    return PeerRejected(f"the JWT-SVID does not verify ({kind})", reason="TOKEN_REJECTED")


def _claims(svid: JwtSvid) -> dict[str, Any]:
    # py-spiffe keeps the claims but does not publish them.
    return svid._claims  # noqa: SLF001


def _issued_at(claims: dict[str, Any]) -> float | None:
    found = claims.get("iat")
    if isinstance(found, bool) or not isinstance(found, (int, float)) or found != found:  # noqa: PLR0124 - NaN
        return None
    return found


def _key_id(token: str) -> str:
    # Read of a token that was verified: its header is the one that named the key.
    return str(jwt.get_unverified_header(token).get("kid", ""))
