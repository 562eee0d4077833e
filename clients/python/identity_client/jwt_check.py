"""Checks JWT-SVIDs that others send: by py-spiffe, and against what was revoked."""

from __future__ import annotations

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
        PeerRevoked: the broker revoked it.
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
        PeerRevoked: the broker revoked it.
    """
    try:
        svid = JwtSvid.parse_and_validate(token, bundle, {audience})
    except PySpiffeError as exc:
        raise _rejected(exc) from None
    if _jti(svid) in denied:
        raise PeerRevoked(f'the JWT-SVID of "{svid.spiffe_id}" is revoked')
    return svid


def _rejected(why: Exception) -> PeerRejected:
    # The class names the rule; never raised "from" it, because its words could quote the token.
    kind = type(why).__name__
    return PeerRejected(f"the JWT-SVID does not verify ({kind})", reason="TOKEN_REJECTED")


def _jti(svid: JwtSvid) -> str:
    # py-spiffe keeps the claims but does not publish them.
    return str(svid._claims.get("jti", ""))  # noqa: SLF001
