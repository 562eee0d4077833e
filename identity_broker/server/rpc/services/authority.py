"""Authority: what signs, what did, what will."""

from __future__ import annotations

from collections.abc import Mapping

from identity_api.broker.v1 import authority_pb2 as pb
from identity_broker.errors import AuthorityNotFound
from identity_broker.server.rpc.call import Call
from identity_broker.server.rpc.convert import scalars
from identity_broker.server.rpc.convert import trust as convert_trust
from identity_broker.server.rpc.pipeline import ServiceFunction
from identity_broker.signing import Signing


class AuthorityService:
    """The authorities in force."""

    def __init__(self, signing: Signing) -> None:
        self._signing = signing

    def functions(self) -> Mapping[str, ServiceFunction]:
        """Full method name to service function."""
        service = "/identity_api.broker.v1.Authority/"
        return {f"{service}List": self.list, f"{service}Show": self.show}

    async def list(
        self, request: pb.ListAuthoritiesRequest, _call: Call
    ) -> pb.ListAuthoritiesResponse:
        """Return the authorities, X.509 first, newest first."""
        kind = convert_trust.from_authority_kind(request.kind)
        now = self._signing.authorities
        return pb.ListAuthoritiesResponse(
            authorities=[
                convert_trust.to_authority(authority)
                for authorities in (now.x509_set, now.jwt_set)
                if kind is None or authorities.kind is kind
                for authority in sorted(authorities, key=lambda a: a.created_at, reverse=True)
            ]
        )

    async def show(self, request: pb.ShowAuthorityRequest, _call: Call) -> pb.ShowAuthorityResponse:
        """Return one authority."""
        wanted = scalars.from_id(request.id, "id")
        now = self._signing.authorities
        for authority in (*now.x509_set, *now.jwt_set):
            if authority.id == wanted:
                return pb.ShowAuthorityResponse(authority=convert_trust.to_authority(authority))
        raise AuthorityNotFound
