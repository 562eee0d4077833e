"""What JWT verifiers without our SDK need, as JSON.

GET /revocations   {"trust_domain", "sequence", "issued_at", "refresh_hint",
                    "jtis": [{"jti", "exp"}],
                    "not_before": [{"spiffe_id", "iat", "exp"}], "authorities": [ids]}

- A JWT-SVID is to be refused when its `jti` is listed, when its `iat` is not after its subject's
  "iat", or when its `kid` is among the authorities; X.509-SVIDs are for the revocation lists.
- The whole state of one moment, from memory; the entity tag is the change feed's position.
- 503 while the change feed is lost: what was revoked since is not known, and no verifier is to
  take the former state for the present one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from identity_broker.domain.clock import Clock
from identity_broker.domain.credential import CredentialKind, Revocation
from identity_broker.domain.revocation import IdentityEpoch
from identity_broker.errors import BrokerError
from identity_ca.spiffe_id import TrustDomain

_REFRESH_SECONDS: Final = 5


class Denials(Protocol):
    """Where the state comes from; `lifecycle.directory.Directory` is one."""

    @property
    def seq(self) -> int: ...

    def revocations(self) -> Sequence[Revocation]: ...

    def epochs(self) -> Sequence[IdentityEpoch]: ...

    def denied_authorities(self) -> Sequence[str]: ...

    async def check(self) -> None:
        """Raise a BrokerError when the change feed is lost."""


def revocation_routes(
    denials: Denials, *, trust_domain: TrustDomain, clock: Clock
) -> Sequence[Route]:
    """The route."""

    async def revocations(request: Request) -> Response:
        try:
            await denials.check()
        except BrokerError as error:
            return _refused(error)
        headers = {
            "etag": f'"{denials.seq}"',
            "cache-control": f"public, max-age={_REFRESH_SECONDS}",
            "x-content-type-options": "nosniff",
        }
        asked = [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]
        if headers["etag"] in asked:
            return Response(status_code=304, headers=headers)
        now = clock.now()
        content = {
            "trust_domain": str(trust_domain),
            "sequence": denials.seq,
            "issued_at": int(now.timestamp()),
            "refresh_hint": _REFRESH_SECONDS,
            "jtis": [
                {"jti": each.id, "exp": int(each.expires_at.timestamp())}
                for each in denials.revocations()
                if each.kind is CredentialKind.JWT and each.expires_at > now
            ],
            "not_before": [
                {
                    "spiffe_id": str(each.spiffe_id),
                    "iat": int(each.not_before.timestamp()),
                    "exp": int(each.expires_at.timestamp()),
                }
                for each in denials.epochs()
                if each.expires_at > now
            ],
            "authorities": sorted(denials.denied_authorities()),
        }
        return Response(
            json.dumps(content, separators=(",", ":")),
            media_type="application/json",
            headers=headers,
        )

    return (Route("/revocations", revocations, methods=["GET"]),)


def _refused(error: BrokerError) -> Response:
    headers = {
        "cache-control": "no-store",
        "retry-after": str(max(1, round(error.retry_after or 1.0))),
        "x-content-type-options": "nosniff",
    }
    return JSONResponse({"error": error.public, "reason": error.reason}, 503, headers=headers)
