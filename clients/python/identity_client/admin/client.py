"""The admin client: one small class a noun, over one channel.

- Sync: it serves a command line and scripts.
- Lists are walked page by page as they are iterated; a page is never held twice.
- Batches are cut to what one call may carry; the outcomes come back in the order of the items.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import islice
from types import TracebackType
from typing import Self, TypeVar

import grpc

from identity_api.broker.v1 import (
    authority_pb2,
    authority_pb2_grpc,
    bundle_pb2,
    bundle_pb2_grpc,
    credential_pb2,
    credential_pb2_grpc,
    entry_pb2,
    entry_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
    node_sync_pb2,
    node_sync_pb2_grpc,
)
from identity_client._wire.status import error_from_item
from identity_client.admin import _convert as convert
from identity_client.admin._calls import BATCH_SIZE, PAGE_SIZE, call, pages
from identity_client.admin.revocations import Revocations
from identity_client.admin.target import Target
from identity_client.admin.values import (
    Applied,
    Authority,
    AuthorityKind,
    Bundle,
    Credential,
    CredentialQuery,
    Entry,
    EntryChange,
    EntryQuery,
    Explanation,
    JoinToken,
    Node,
    Outcome,
)

T = TypeVar("T")

DEFAULT_TIMEOUT = 15.0
_AWAIT_NODES = 100  # named in one call, at most
_AWAIT_SECONDS = 30.0  # one call waits, at most
_AWAIT_MARGIN = 5.0  # for the answer itself


class AdminClient:
    """Administers one broker. A context manager; thread-safe.

    Args:
        target: the broker's Unix socket, or its mTLS port with an admin SVID.
        timeout: seconds each call may take.

    Raises:
        BrokerUnavailable: nothing can be listening at the target.
        NotPermitted: this user may not connect there.
        SettingsInvalid: a file of the target cannot be used.
    """

    def __init__(self, target: Target, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._channel = target.open()
        self._timeout = timeout
        self.entries = Entries(self._channel, timeout)
        self.nodes = Nodes(self._channel, timeout)
        self.credentials = Credentials(self._channel, timeout)
        self.revocations = Revocations(self._channel, timeout)
        self.authorities = Authorities(self._channel, timeout)
        self._bundle = bundle_pb2_grpc.BundleStub(self._channel)

    def bundle(self) -> Bundle:
        """Return the trust domain's bundle."""
        answer = call(self._bundle.Get, bundle_pb2.GetBundleRequest(), self._timeout)
        return convert.bundle_from_wire(answer.bundle)

    def close(self) -> None:
        """Close the channel. Idempotent."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Entries:
    """Registration entries."""

    def __init__(self, channel: grpc.Channel, timeout: float) -> None:
        self._stub = entry_pb2_grpc.EntryStub(channel)
        self._timeout = timeout

    def create(self, entries: Sequence[Entry]) -> list[Outcome[Entry]]:
        """Create entries; one outcome each, in order."""
        outcomes: list[Outcome[Entry]] = []
        for batch in _batches(entries):
            request = entry_pb2.BatchCreateEntryRequest(
                entries=[convert.entry_to_wire(entry) for entry in batch]
            )
            answer = call(self._stub.BatchCreate, request, self._timeout)
            outcomes.extend(_entry_outcome(result) for result in answer.results)
        return outcomes

    def update(self, changes: Sequence[EntryChange]) -> list[Outcome[Entry]]:
        """Replace the named fields of entries; one outcome each, in order."""
        outcomes: list[Outcome[Entry]] = []
        for batch in _batches(changes):
            items = [
                entry_pb2.BatchUpdateEntryRequest.Item(
                    entry=convert.entry_to_wire(change.entry),
                    fields=sorted(convert.WIRE_FIELDS.get(name, name) for name in change.fields),
                )
                for change in batch
            ]
            request = entry_pb2.BatchUpdateEntryRequest(items=items)
            answer = call(self._stub.BatchUpdate, request, self._timeout)
            outcomes.extend(_entry_outcome(result) for result in answer.results)
        return outcomes

    def delete(self, ids: Sequence[str]) -> list[Outcome[str]]:
        """Delete entries; one outcome each, in order. What was issued from them stays valid."""
        outcomes: list[Outcome[str]] = []
        for batch in _batches(ids):
            request = entry_pb2.BatchDeleteEntryRequest(ids=batch)
            answer = call(self._stub.BatchDelete, request, self._timeout)
            outcomes.extend(
                Outcome(result.id, error_from_item(result.status)) for result in answer.results
            )
        return outcomes

    def get(self, entry_id: str) -> Entry:
        """Return one entry.

        Raises:
            ObjectNotFound: ENTRY_NOT_FOUND.
        """
        answer = call(self._stub.Get, entry_pb2.GetEntryRequest(id=entry_id), self._timeout)
        return convert.entry_from_wire(answer.entry)

    def list(self, query: EntryQuery | None = None) -> Iterator[Entry]:
        """Iterate over the entries that match, by id."""
        query = query or EntryQuery()

        def fetch(token: str) -> entry_pb2.ListEntriesResponse:
            request = entry_pb2.ListEntriesRequest(
                page_size=PAGE_SIZE,
                page_token=token,
                spiffe_id=query.spiffe_id,
                parent_id=query.parent_id,
                selectors=[convert.selector_to_wire(text) for text in query.selectors],
                owner=query.owner,
                hint=query.hint,
            )
            return call(self._stub.List, request, self._timeout)

        for page in pages(fetch):
            yield from map(convert.entry_from_wire, page.entries)

    def explain(
        self, *, node_id: str, entry_id: str = "", spiffe_id: str = ""
    ) -> Sequence[Explanation]:
        """Say why an entry, or every entry of a SPIFFE ID, would or would not be issued to a node.

        Raises:
            ObjectNotFound: ENTRY_NOT_FOUND, NODE_NOT_FOUND.
            RequestRejected: not exactly one of `entry_id` and `spiffe_id`.
        """
        request = entry_pb2.ExplainRequest(entry_id=entry_id, spiffe_id=spiffe_id, node_id=node_id)
        answer = call(self._stub.Explain, request, self._timeout)
        return [convert.explanation_from_wire(found) for found in answer.explanations]


class Nodes:
    """Attested nodes and the tokens new ones join with."""

    def __init__(self, channel: grpc.Channel, timeout: float) -> None:
        self._stub = node_pb2_grpc.NodeStub(channel)
        self._sync = node_sync_pb2_grpc.NodeSyncStub(channel)
        self._timeout = timeout

    def list(self, *, attestor: str = "", banned: bool | None = None) -> Iterator[Node]:
        """Iterate over the nodes that match, by SPIFFE ID; `banned` None means both."""
        wanted = node_pb2.BANNED_FILTER_UNSPECIFIED
        if banned is not None:
            wanted = node_pb2.BANNED_FILTER_BANNED if banned else node_pb2.BANNED_FILTER_NOT_BANNED

        def fetch(token: str) -> node_pb2.ListNodesResponse:
            request = node_pb2.ListNodesRequest(
                page_size=PAGE_SIZE, page_token=token, attestor=attestor, banned=wanted
            )
            return call(self._stub.List, request, self._timeout)

        for page in pages(fetch):
            yield from map(convert.node_from_wire, page.nodes)

    def get(self, node_id: str) -> Node:
        """Return one node.

        Raises:
            ObjectNotFound: NODE_NOT_FOUND.
        """
        answer = call(self._stub.Get, node_pb2.GetNodeRequest(spiffe_id=node_id), self._timeout)
        return convert.node_from_wire(answer.node)

    def ban(self, node_id: str, *, reason: str = "") -> tuple[Node, int]:
        """Refuse the node from now on; return it and how many of its credentials were revoked."""
        request = node_pb2.BanNodeRequest(spiffe_id=node_id, reason=reason)
        answer = call(self._stub.Ban, request, self._timeout)
        return convert.node_from_wire(answer.node), answer.revoked

    def evict(self, node_id: str) -> int:
        """Forget the node; return how many of its credentials were revoked."""
        request = node_pb2.EvictNodeRequest(spiffe_id=node_id)
        return call(self._stub.Evict, request, self._timeout).revoked

    def wait_applied(
        self, node_ids: Sequence[str] = (), *, timeout: timedelta = timedelta(seconds=10)
    ) -> Applied:
        """Wait until the nodes concerned have applied every change that was made before the call.

        Args:
            node_ids: nodes that are waited for even while they are not connected.
            timeout: how long to wait for all of them; what is left over then is `pending`.

        Raises:
            RequestRejected: MALFORMED_REQUEST.
        """
        until = time.monotonic() + timeout.total_seconds()
        # The broker takes the names in portions; what one call waited for, the next finds done.
        portions = [
            node_ids[at : at + _AWAIT_NODES] for at in range(0, len(node_ids), _AWAIT_NODES)
        ]
        answers = [self._await(portion, until) for portion in portions or [()]]
        stands = {
            node: done
            for answer in answers  # the last word on a node counts
            for nodes, done in ((answer.applied, True), (answer.pending, False))
            for node in nodes
        }
        return Applied(
            revision=answers[0].revision,
            applied=tuple(sorted(node for node, done in stands.items() if done)),
            pending=tuple(sorted(node for node, done in stands.items() if not done)),
            connected=answers[-1].connected,
        )

    def _await(self, node_ids: Sequence[str], until: float) -> node_sync_pb2.AwaitNodesResponse:
        while True:
            left = until - time.monotonic()
            wait = max(0.001, min(left, _AWAIT_SECONDS))
            request = node_sync_pb2.AwaitNodesRequest(
                node_ids=node_ids, timeout_ms=max(1, round(wait * 1000))
            )
            answer = call(self._sync.Await, request, wait + _AWAIT_MARGIN)
            if not answer.pending or left <= _AWAIT_SECONDS:
                return answer

    def create_join_token(self, *, ttl: timedelta | None = None, node_name: str = "") -> JoinToken:
        """Make a token that attests one node once; the broker's default TTL when None."""
        request = node_pb2.CreateJoinTokenRequest(
            ttl_seconds=convert.ttl_to_wire(ttl), node_name=node_name
        )
        answer = call(self._stub.CreateJoinToken, request, self._timeout)
        return JoinToken(
            token=answer.token,
            expires_at=convert.time_from_wire(answer.expires_at),
            node_id=answer.node_id,
        )


class Credentials:
    """The ledger."""

    def __init__(self, channel: grpc.Channel, timeout: float) -> None:
        self._stub = credential_pb2_grpc.CredentialStub(channel)
        self._timeout = timeout

    def list(self, query: CredentialQuery | None = None) -> Iterator[Credential]:
        """Iterate over the credentials that match, newest first."""
        query = query or CredentialQuery()

        def fetch(token: str) -> credential_pb2.ListCredentialsResponse:
            request = credential_pb2.ListCredentialsRequest(
                page_size=PAGE_SIZE,
                page_token=token,
                spiffe_id=query.spiffe_id,
                node_id=query.node_id,
                entry_id=query.entry_id,
                states=[convert.state_to_wire(state) for state in sorted(query.states)],
                kind=convert.kind_to_wire(query.kind),
            )
            return call(self._stub.List, request, self._timeout)

        for page in pages(fetch):
            yield from map(convert.credential_from_wire, page.credentials)

    def get(self, credential_id: str) -> Credential:
        """Return one credential by serial or jti.

        Raises:
            ObjectNotFound: CREDENTIAL_NOT_FOUND.
        """
        request = credential_pb2.GetCredentialRequest(id=credential_id)
        answer = call(self._stub.Get, request, self._timeout)
        return convert.credential_from_wire(answer.credential)


class Authorities:
    """The signing authorities."""

    def __init__(self, channel: grpc.Channel, timeout: float) -> None:
        self._stub = authority_pb2_grpc.AuthorityStub(channel)
        self._timeout = timeout

    def list(self, kind: AuthorityKind | None = None) -> Sequence[Authority]:
        """Return all that are trusted or about to be, X.509 first, newest first."""
        request = authority_pb2.ListAuthoritiesRequest(kind=convert.authority_kind_to_wire(kind))
        answer = call(self._stub.List, request, self._timeout)
        return [convert.authority_from_wire(record) for record in answer.authorities]

    def get(self, authority_id: str) -> Authority:
        """Return one authority.

        Raises:
            ObjectNotFound: AUTHORITY_NOT_FOUND.
        """
        request = authority_pb2.ShowAuthorityRequest(id=authority_id)
        answer = call(self._stub.Show, request, self._timeout)
        return convert.authority_from_wire(answer.authority)


def _entry_outcome(result: entry_pb2.EntryResult) -> Outcome[Entry]:
    entry = convert.entry_from_wire(result.entry) if result.HasField("entry") else None
    return Outcome(entry, error_from_item(result.status))


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH_SIZE)):
        yield batch
