"""Entry: who may become what."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from identity_api.broker.v1 import entry_pb2 as pb
from identity_api.broker.v1 import types_pb2
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.selector_syntax import SelectorSyntax
from identity_broker.errors import (
    BrokerError,
    EntryExists,
    EntryNotFound,
    MalformedRequest,
)
from identity_broker.lifecycle.authorize import Authorize
from identity_broker.lifecycle.directory import Directory, Update
from identity_broker.registry.entries import Entries, new_entry_id
from identity_broker.server.rpc.call import Call
from identity_broker.server.rpc.convert import entries as convert_entry
from identity_broker.server.rpc.convert import scalars
from identity_broker.server.rpc.pipeline import ServiceFunction
from identity_broker.server.rpc.services.svid import calling_node
from identity_broker.server.rpc.status import item_status
from identity_broker.server.rpc.watch import subscription

RESULT = TypeVar("RESULT")

_OK = types_pb2.Status(code=0)
_CHUNK = 500


class EntryService:
    """Registration entries, for operators and for the nodes they concern."""

    def __init__(
        self,
        entries: Entries,
        authorize: Authorize,
        directory: Directory,
        selectors: SelectorSyntax,
    ) -> None:
        self._entries = entries
        self._authorize = authorize
        self._directory = directory
        self._selectors = selectors

    def functions(self) -> Mapping[str, ServiceFunction]:
        """Full method name to service function."""
        service = "/identity_api.broker.v1.Entry/"
        return {
            f"{service}BatchCreate": self.batch_create,
            f"{service}BatchUpdate": self.batch_update,
            f"{service}BatchDelete": self.batch_delete,
            f"{service}Get": self.get,
            f"{service}List": self.list,
            f"{service}Watch": self.watch,
            f"{service}ListAuthorized": self.list_authorized,
            f"{service}Explain": self.explain,
        }

    async def batch_create(
        self, request: pb.BatchCreateEntryRequest, call: Call
    ) -> pb.BatchCreateEntryResponse:
        """Create entries, each with its own status."""
        scalars.from_batch(request.entries, "entries")
        parsed = [self._parsed(item) for item in request.entries]
        good = [entry for entry in parsed if isinstance(entry, RegistrationEntry)]
        created = await self._entries.create(good, call.caller) if good else []
        return pb.BatchCreateEntryResponse(
            results=[_result(item) for item in _merged(parsed, created)]
        )

    async def batch_update(
        self, request: pb.BatchUpdateEntryRequest, call: Call
    ) -> pb.BatchUpdateEntryResponse:
        """Change entries, each with its own status."""
        scalars.from_batch(request.items, "items")
        ids = [_id(item.entry.id, "entry.id") for item in request.items]
        changes = [
            (entry_id, item.entry.revision, self._change(item))
            for entry_id, item in zip(ids, request.items, strict=True)
            if isinstance(entry_id, str)
        ]
        results = await self._entries.update(changes, call.caller) if changes else []
        return pb.BatchUpdateEntryResponse(
            results=[_result(item) for item in _merged(ids, results)]
        )

    async def batch_delete(
        self, request: pb.BatchDeleteEntryRequest, call: Call
    ) -> pb.BatchDeleteEntryResponse:
        """Delete entries, each with its own status."""
        scalars.from_batch(request.ids, "ids")
        ids = [_id(item, "ids") for item in request.ids]
        good = [item for item in ids if isinstance(item, str)]
        results = await self._entries.delete(good, call.caller) if good else []
        return pb.BatchDeleteEntryResponse(
            results=[
                pb.BatchDeleteEntryResponse.Result(
                    id=entry_id,
                    status=item_status(result) if isinstance(result, BrokerError) else _OK,
                )
                for entry_id, result in zip(request.ids, _merged(ids, results), strict=True)
            ]
        )

    async def get(self, request: pb.GetEntryRequest, _call: Call) -> pb.GetEntryResponse:
        """Return one entry."""
        entry = await self._entries.get(scalars.from_id(request.id, "id"))
        return pb.GetEntryResponse(entry=convert_entry.to_entry(entry))

    async def list(self, request: pb.ListEntriesRequest, call: Call) -> pb.ListEntriesResponse:
        """Return a page of entries."""
        scope = scalars.page_scope(call.method, request)
        page = await self._entries.page(
            convert_entry.from_entry_filter(request),
            scalars.from_page_token(request.page_token, scope),
            scalars.from_page_size(request.page_size),
        )
        return pb.ListEntriesResponse(
            entries=[convert_entry.to_entry(entry) for entry in page.items],
            next_page_token=scalars.to_page_token(page.next_key, scope),
        )

    async def watch(
        self, _request: pb.WatchEntriesRequest, _call: Call
    ) -> AsyncIterator[pb.WatchEntriesResponse]:
        """Send every entry, then every change."""
        with subscription(self._directory.listen) as watcher:
            seq = self._directory.seq
            entries = list(self._directory.entries())
            for at in range(0, len(entries), _CHUNK):
                yield pb.WatchEntriesResponse(
                    revision=seq,
                    changed=[convert_entry.to_entry(entry) for entry in entries[at : at + _CHUNK]],
                )
            yield pb.WatchEntriesResponse(revision=seq, synced=True)
            async for update in watcher.items():
                if update.changed_entries or update.deleted_entry_ids:
                    yield _changed(update)

    async def list_authorized(
        self, _request: pb.ListAuthorizedRequest, call: Call
    ) -> pb.ListAuthorizedResponse:
        """Return the entries the calling node may ask SVIDs for."""
        entries = self._authorize.entries(calling_node(call))
        return pb.ListAuthorizedResponse(
            entries=[convert_entry.to_entry(entry) for entry in entries],
            revision=self._directory.seq,
        )

    async def explain(self, request: pb.ExplainRequest, _call: Call) -> pb.ExplainResponse:
        """Say why entries would or would not be issued to a node."""
        node_id = scalars.from_spiffe_id(request.node_id, "node_id")
        if bool(request.entry_id) == bool(request.spiffe_id):
            raise MalformedRequest("name either entry_id or spiffe_id")
        if request.entry_id:
            entry = self._directory.entry(scalars.from_id(request.entry_id, "entry_id"))
            entries = [entry] if entry else []
        else:
            wanted = scalars.from_spiffe_id(request.spiffe_id, "spiffe_id")
            entries = [item for item in self._directory.entries() if item.spiffe_id == wanted]
        if not entries:
            raise EntryNotFound(
                f'no registration entry is for "{request.entry_id or request.spiffe_id}"'
            )
        node = self._directory.node(node_id)
        response = pb.ExplainResponse()
        for entry in sorted(entries, key=lambda item: item.id):
            checks = self._authorize.explain(entry, node, node_id)
            response.explanations.add(
                entry=convert_entry.to_entry(entry),
                authorized=all(check.held for check in checks),
                checks=[convert_entry.to_check(check) for check in checks],
            )
        return response

    def _parsed(self, message: types_pb2.RegistrationEntry) -> RegistrationEntry | BrokerError:
        try:
            entry = convert_entry.from_entry(message, message.id or new_entry_id())
            self._selectors.check_all(entry.selectors)
        except BrokerError as error:
            return error
        return entry

    def _change(
        self, item: pb.BatchUpdateEntryRequest.Item
    ) -> Callable[[RegistrationEntry], RegistrationEntry]:
        def change(stored: RegistrationEntry) -> RegistrationEntry:
            entry = convert_entry.from_update(stored, item.entry, item.fields)
            # What an older broker stored may stay.
            self._selectors.check_all(entry.selectors - stored.selectors)
            return entry

        return change


def _id(text: str, field: str) -> str | BrokerError:
    try:
        return scalars.from_id(text, field)
    except BrokerError as error:
        return error


def _merged(
    parsed: Iterable[object], results: Iterable[RESULT | BrokerError]
) -> Iterator[RESULT | BrokerError]:
    """Each item's refusal, or what became of it, in the request's order."""
    rest = iter(results)
    for item in parsed:
        yield item if isinstance(item, BrokerError) else next(rest)


def _result(result: RegistrationEntry | BrokerError) -> pb.EntryResult:
    if not isinstance(result, BrokerError):
        return pb.EntryResult(status=_OK, entry=convert_entry.to_entry(result))
    stored = result.fields.get("entry") if isinstance(result, EntryExists) else None
    message = pb.EntryResult(status=item_status(result))
    if isinstance(stored, RegistrationEntry):
        message.entry.CopyFrom(convert_entry.to_entry(stored))
    return message


def _changed(update: Update) -> pb.WatchEntriesResponse:
    return pb.WatchEntriesResponse(
        revision=update.seq,
        changed=[convert_entry.to_entry(entry) for entry in update.changed_entries],
        deleted_ids=update.deleted_entry_ids,
        synced=True,
    )
