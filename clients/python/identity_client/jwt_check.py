"""Checks JWT-SVIDs that others send: by py-spiffe, and against what was revoked."""

from __future__ import annotations

from spiffe import JwtBundle, JwtSvid
from spiffe.errors import PySpiffeError

from identity_client.errors import PeerRejected, PeerRevoked
from identity_client.revocation import DenySet

__all__ = ["verify_jwt_svid"]


def verify_jwt_svid(token: str, audience: str, *, bundle: JwtBundle, denied: DenySet) -> JwtSvid:
    """The token's claims, once signature, expiry, audience and revocation were checked.

    Raises:
        PeerRejected: reason TOKEN_REJECTED (JWT-SVID section 5).
        PeerRevoked: the broker revoked it.
    """
    try:
        svid = JwtSvid.parse_and_validate(token, bundle, {audience})
    except PySpiffeError as exc:
        # The parser's words name the rule; "from None" because a cause could quote the token.
        kind = type(exc).__name__
        raise PeerRejected(
            f"the JWT-SVID does not verify ({kind})", reason="TOKEN_REJECTED"
        ) from None
    if _jti(svid) in denied:
        raise PeerRevoked(f'the JWT-SVID of "{svid.spiffe_id}" is revoked')
    return svid


def _jti(svid: JwtSvid) -> str:
    # py-spiffe keeps the claims but does not publish them.
    return str(svid._claims.get("jti", ""))  # noqa: SLF001
