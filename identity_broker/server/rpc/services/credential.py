"""Credential: the ledger."""

from __future__ import annotations

from collections.abc import Mapping

from identity_api.broker.v1 import credential_pb2 as pb
from identity_broker.server.rpc.call import Call
from identity_broker.server.rpc.convert import credentials as convert_credential
from identity_broker.server.rpc.convert import scalars
from identity_broker.server.rpc.pipeline import ServiceFunction
from identity_broker.store import Store


class CredentialService:
    """What the broker set out to issue."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def functions(self) -> Mapping[str, ServiceFunction]:
        """Full method name to service function."""
        service = "/identity_api.broker.v1.Credential/"
        return {f"{service}List": self.list, f"{service}Get": self.get}

    async def list(
        self, request: pb.ListCredentialsRequest, call: Call
    ) -> pb.ListCredentialsResponse:
        """Return a page of credentials, newest first."""
        wanted = convert_credential.from_credential_filter(request)
        scope = scalars.page_scope(call.method, request)
        before = scalars.from_page_token(request.page_token, scope)
        size = scalars.from_page_size(request.page_size)
        # What this broker has issued but not yet concluded is part of the answer.
        await self._store.ledger.flush()
        page = await self._store.read(lambda repos: repos.credentials.page(wanted, before, size))
        return pb.ListCredentialsResponse(
            credentials=[convert_credential.to_credential(item) for item in page.items],
            next_page_token=scalars.to_page_token(page.next_key, scope),
        )

    async def get(self, request: pb.GetCredentialRequest, _call: Call) -> pb.GetCredentialResponse:
        """Return one credential."""
        credential_id = scalars.from_id(request.id, "id")
        await self._store.ledger.flush()
        credential = await self._store.read(lambda repos: repos.credentials.get(credential_id))
        return pb.GetCredentialResponse(credential=convert_credential.to_credential(credential))
