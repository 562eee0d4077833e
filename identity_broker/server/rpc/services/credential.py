"""Credential: the ledger, and how to end what stands in it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

from identity_api.broker.v1 import credential_pb2 as pb
from identity_broker.errors import MalformedRequest
from identity_broker.lifecycle.directory import Directory
from identity_broker.lifecycle.revoke import Revoke
from identity_broker.server.rpc.call import Call
from identity_broker.server.rpc.convert import credentials as convert_credential
from identity_broker.server.rpc.convert import scalars
from identity_broker.server.rpc.pipeline import ServiceFunction
from identity_broker.server.rpc.watch import subscription
from identity_broker.store import Store

_CHUNK = 1000


class CredentialService:
    """Listing and revoking credentials, and telling verifiers."""

    def __init__(self, store: Store, revoke: Revoke, directory: Directory) -> None:
        self._store = store
        self._revoke = revoke
        self._directory = directory

    def functions(self) -> Mapping[str, ServiceFunction]:
        """Full method name to service function."""
        service = "/identity_api.broker.v1.Credential/"
        return {
            f"{service}List": self.list,
            f"{service}Get": self.get,
            f"{service}Revoke": self.revoke,
            f"{service}WatchRevocations": self.watch_revocations,
        }

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

    async def revoke(
        self, request: pb.RevokeCredentialRequest, call: Call
    ) -> pb.RevokeCredentialResponse:
        """Revoke one credential, or all of a SPIFFE ID."""
        reason = convert_credential.from_reason(request.reason)
        comment = scalars.from_text(request.comment, "comment")
        subject = request.WhichOneof("subject")
        if subject == "id":
            credential_id = scalars.from_id(request.id, "id")
            revoked = await self._revoke.credential(credential_id, reason, comment, call.caller)
        elif subject == "spiffe_id":
            revoked = await self._revoke.identity(
                scalars.from_spiffe_id(request.spiffe_id, "spiffe_id"),
                reason,
                comment,
                call.caller,
                keep_entries=request.keep_entries,
            )
        else:
            raise MalformedRequest("name what to revoke: id or spiffe_id")
        return pb.RevokeCredentialResponse(
            revoked_ids=[revocation.id for revocation in revoked.revocations],
            already_revoked=revoked.already_revoked,
            disabled_entry_ids=revoked.disabled_entry_ids,
        )

    async def watch_revocations(
        self, _request: pb.WatchRevocationsRequest, _call: Call
    ) -> AsyncIterator[pb.WatchRevocationsResponse]:
        """Send every live revocation, then each new one."""
        with subscription(self._directory.listen) as watcher:
            seq = self._directory.seq
            known = self._directory.revocations()
            for at in range(0, len(known), _CHUNK):
                yield pb.WatchRevocationsResponse(
                    revision=seq,
                    revocations=[
                        convert_credential.to_revocation(item) for item in known[at : at + _CHUNK]
                    ],
                )
            yield pb.WatchRevocationsResponse(revision=seq, synced=True)
            async for update in watcher.items():
                if update.revocations:
                    yield pb.WatchRevocationsResponse(
                        revision=update.seq,
                        revocations=[
                            convert_credential.to_revocation(item) for item in update.revocations
                        ],
                        synced=True,
                    )
