"""Obtains an identity and keeps it: attest, issue, renew, watch; retried until closed.

- Three loops side by side: one obtains and renews, two watch the bundle and the revocations. Each
  backs off on its own; none ends but by `close` (or by a bug, which is logged).
- What is valid stays in use whatever fails: only expiry and revocation take it away.
- The first identity chosen is kept for the life of the process, by SPIFFE ID: entries may be
  replaced under it, it never becomes somebody else.
- A node that the broker does not know any more attests again where its attestor can.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import DecodeError
from spiffe import JwtSvid, SpiffeId
from spiffe.errors import PySpiffeError

from identity_api.broker.v1 import types_pb2
from identity_client._wire.convert import AuthorizedEntry, bundle_from_wire, time_from_wire
from identity_client.clock import roll, utc_now
from identity_client.credential import BundleSnapshot, X509Material
from identity_client.errors import (
    IdentityError,
    IdentityNotReady,
    NotAuthenticated,
    NotPermitted,
    ProtocolViolation,
    RequestRejected,
    SettingsInvalid,
)
from identity_client.holder import IdentityHolder
from identity_client.jwt_cache import CachedToken, JwtCache, JwtKey
from identity_client.link import REPLACED, BrokerLink
from identity_client.renewal import renewal_due, retry_delay
from identity_client.settings import SourceSettings
from identity_client.state_dir import NodeState, StateDir

__all__ = ["Engine"]

_logger = logging.getLogger(__name__)

# The wall clock may jump and machines sleep: due times are looked at again at least this often.
_INSIST_SECONDS = 1.0
_LONGEST_SLEEP = timedelta(seconds=60)
_SHORTEST_SLEEP = timedelta(milliseconds=100)
_WATCH_CAP = timedelta(seconds=5)
# What the broker decided; anything else may be waited out with a token that is still valid.
_DECIDED = (NotPermitted, NotAuthenticated, RequestRejected)
_NODE_LOST = frozenset({"NODE_UNKNOWN", "CREDENTIAL_REVOKED", "UNAUTHENTICATED"})
_TLS_FAILED = "BROKER_TLS_FAILED"
_NO_ANSWER = frozenset({_TLS_FAILED, "BROKER_UNREACHABLE"})
_PATIENCE = 5


@dataclass(frozen=True, slots=True)
class _Node:
    material: X509Material
    due: datetime
    reattestable: bool


class Engine:
    """The moving part of a source. Belongs to one event loop; the holder is read by anybody."""

    def __init__(
        self,
        settings: SourceSettings,
        holder: IdentityHolder,
        *,
        dice: Callable[[], float] = roll,
    ) -> None:
        self._settings = settings
        self._holder = holder
        self._dice = dice
        self._link = BrokerLink(settings)
        self._state: StateDir | None = None
        self._bundle: BundleSnapshot | None = None
        self._bundle_message = b""
        self._node: _Node | None = None
        self._entry: AuthorizedEntry | None = None
        self._identity: SpiffeId | None = settings.spiffe_id
        self._svid_due: datetime | None = None
        self._wake = asyncio.Event()
        self._connected = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._jwt_cache = JwtCache()
        self._jwt_flights: dict[JwtKey, asyncio.Task[JwtSvid]] = {}
        self.changed = asyncio.Condition()

    # --- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Reads the trust anchors and the kept state, and starts the loops.

        Raises:
            SettingsInvalid: a file cannot be read or used.
        """
        self._bundle = await asyncio.to_thread(self._settings.trust_anchors)
        if self._settings.state_dir is not None:
            self._state = await asyncio.to_thread(StateDir, self._settings.state_dir)
            try:
                self._resume(self._state, await asyncio.to_thread(self._state.load))
            except BaseException:
                self._state.close()
                raise
        for loop in (self._keep_identity, self._keep_bundle, self._keep_revocations):
            task = asyncio.create_task(loop(), name=f"identity-{loop.__name__}")
            task.add_done_callback(_report_bug)
            self._tasks.append(task)

    async def close(self) -> None:
        """Ends the loops and the connections."""
        pending: set[asyncio.Task[Any]] = {*self._tasks, *self._jwt_flights.values()}
        while pending:
            # More than once: a library that ends a call may swallow the first.
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=_INSIST_SECONDS)
        await self._link.close()
        if self._state is not None:
            self._state.close()
        self._holder.close()
        await self._tell()

    # --- the identity --------------------------------------------------------------------------

    async def _keep_identity(self) -> None:
        failures = 0
        while True:
            self._wake.clear()
            try:
                await self._advance()
            except IdentityError as error:
                failures += 1
                pause = await self._after_failure(error, failures)
            else:
                failures = 0
                self._holder.record_success()
                pause = self._until_due()
            await self._tell()
            with suppress(TimeoutError):
                async with asyncio.timeout(pause.total_seconds()):
                    await self._wake.wait()

    async def _advance(self) -> None:
        now = utc_now()
        self._holder.denied.prune(now=now)
        if self._node is not None and now >= self._node.material.not_after:
            self._forget_node("its SVID has expired")
        if self._node is None:
            await self._attest()
        elif now >= self._node.due:
            await self._renew_node(self._node)
        if self._svid_due is None or utc_now() >= self._svid_due or self._holder.revoked:
            await self._issue()

    async def _attest(self) -> None:
        attested = await self._link.attest(self._trusted())
        _logger.info("node attested: %s", attested.material.spiffe_id)
        self._bundle_message = attested.bundle_message
        self._take_bundle(attested.bundle)
        await self._adopt_node(attested.material, reattestable=attested.reattestable)

    async def _renew_node(self, node: _Node) -> None:
        material, bundle = await self._link.renew_node(self._trusted())
        self._take_bundle(bundle)
        await self._adopt_node(material, reattestable=node.reattestable)

    async def _adopt_node(self, material: X509Material, *, reattestable: bool) -> None:
        due = renewal_due(
            received=material.received, not_after=material.not_after, dice=self._dice()
        )
        self._node = _Node(material, due, reattestable)
        self._reconnect(self._node)
        await self._keep_state()

    async def _issue(self) -> None:
        entry = await self._choose_entry()
        material, bundle = await self._link.issue_x509(entry, self._trusted())
        self._take_bundle(bundle)
        self._svid_due = renewal_due(
            received=material.received, not_after=material.not_after, dice=self._dice()
        )
        snapshot = self._holder.publish(material, bundle)
        _logger.info(
            "identity issued: %s, serial %s, expires %s",
            snapshot.spiffe_id,
            snapshot.serial,
            snapshot.not_after.isoformat(),
        )

    async def _choose_entry(self) -> AuthorizedEntry:
        entries = await self._link.list_authorized(now=utc_now())
        wanted = self._identity
        for entry in entries:
            if wanted is None or entry.spiffe_id == wanted:
                self._entry, self._identity = entry, entry.spiffe_id
                return entry
        node = self._node.material.spiffe_id if self._node else ""
        if wanted is None:
            raise NotPermitted(
                "this machine is not authorized for any identity",
                reason="ENTRY_NOT_AUTHORIZED",
                hint=f'register one below "{node}": idb entry create',
            )
        raise NotPermitted(
            f'this machine is not authorized for "{wanted}"',
            reason="ENTRY_NOT_AUTHORIZED",
            hint=f'idb explain "{wanted}" --node "{node}" says which rule did not hold',
        )

    async def _after_failure(self, error: IdentityError, failures: int) -> timedelta:
        self._holder.record_failure(error)
        _logger.warning("obtaining the identity failed (%d): %s", failures, error)
        if error.reason == _TLS_FAILED:
            await self._reread_anchors()
        if self._node is not None and self._node_is_lost(self._node, error, failures):
            self._forget_node(error.message)
        elif self._node is not None and error.reason == _TLS_FAILED:
            self._reconnect(self._node)
        current = self._holder.peek()
        remaining = current.not_after - utc_now() if current and not self._holder.revoked else None
        return retry_delay(
            failures, dice=self._dice(), remaining=remaining, retry_after=error.retry_after
        )

    def _until_due(self) -> timedelta:
        dues = [due for due in (self._node and self._node.due, self._svid_due) if due]
        return max(min(min(dues) - utc_now(), _LONGEST_SLEEP), _SHORTEST_SLEEP)

    # --- the node ------------------------------------------------------------------------------

    def _node_is_lost(self, node: _Node, error: IdentityError, failures: int) -> bool:
        if not self._settings.attestor.renewable:
            # A spent token cannot attest again; the broker's own refusal says more than "spent".
            return False
        if error.reason in _NODE_LOST:
            return True
        # A broker that does not trust our certificate any more cannot say so: TLS merely breaks.
        return node.reattestable and error.reason in _NO_ANSWER and failures >= _PATIENCE

    def _forget_node(self, why: str) -> None:
        _logger.warning("attesting again: %s", why)
        self._node = None
        self._connected.clear()

    async def _reread_anchors(self) -> None:
        # The broker's roots may have been replaced while we were away: the operator's file is
        # then newer than what we learned.
        with suppress(SettingsInvalid):
            self._bundle = await asyncio.to_thread(self._settings.trust_anchors)

    def _reconnect(self, node: _Node) -> None:
        self._link.connect(node.material, self._trusted())
        self._connected.set()

    def _trusted(self) -> BundleSnapshot:
        if self._bundle is None:
            raise IdentityNotReady("the identity source was not started")
        return self._bundle

    def _take_bundle(self, bundle: BundleSnapshot) -> bool:
        if self._bundle is not None and self._bundle.same_keys(bundle):
            return False
        self._bundle = bundle
        self._holder.publish_bundle(bundle)
        return True

    def _resume(self, state: StateDir, kept: NodeState | None) -> None:
        if kept is None or kept.trust_domain != self._settings.trust_domain.name:
            return
        try:
            message = types_pb2.TrustBundle.FromString(kept.bundle)
            bundle = bundle_from_wire(message, self._settings.trust_domain)
            key = serialization.load_pem_private_key(kept.key_pem, password=None)
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise TypeError
            material = X509Material.from_chain(
                kept.chain, private_key=key, bundle=bundle, received=utc_now()
            )
        except (ProtocolViolation, DecodeError, ValueError, TypeError):
            # "from None": the parser's message could quote the key.
            raise state.damaged() from None
        if material.not_after <= utc_now():
            return
        # Renewed at once: how much of its life was used is not known, and it proves that the
        # broker still knows this node.
        self._bundle, self._bundle_message = bundle, kept.bundle
        self._node = _Node(material, utc_now(), kept.reattestable)
        self._reconnect(self._node)

    async def _keep_state(self) -> None:
        if self._state is None or self._node is None:
            return
        material = self._node.material
        state = NodeState(
            trust_domain=self._settings.trust_domain.name,
            key_pem=material.key_pem,
            chain=tuple(
                one.public_bytes(serialization.Encoding.DER) for one in material.svid.cert_chain
            ),
            bundle=self._bundle_message,
            reattestable=self._node.reattestable,
        )
        await asyncio.to_thread(self._state.save, state)

    # --- what the broker tells -----------------------------------------------------------------

    async def _keep_bundle(self) -> None:
        async def follow() -> AsyncIterator[None]:
            async for bundle, message in self._link.watch_bundle():
                self._bundle_message = message
                if self._take_bundle(bundle):
                    if self._node is not None:
                        self._reconnect(self._node)
                    await self._keep_state()
                    await self._tell()
                yield

        await self._follow("bundle", follow)

    async def _keep_revocations(self) -> None:
        async def follow() -> AsyncIterator[None]:
            try:
                async for update in self._link.watch_revocations():
                    if self._holder.revoke(update.revoked, now=utc_now()):
                        await self._tell()
                        self._wake.set()
                    self._holder.denied.synced = update.synced
                    yield
            finally:
                self._holder.denied.synced = False

        await self._follow("revocations", follow)

    async def _follow(self, what: str, follow: Callable[[], AsyncIterator[None]]) -> None:
        failures = 0
        while True:
            await self._connected.wait()
            retry_after: float | None = None
            try:
                async for _ in follow():
                    failures = 0
                reason = "the stream ended"
            except IdentityError as error:
                if error.reason == REPLACED:
                    continue
                reason, retry_after = str(error), error.retry_after
            failures += 1
            _logger.info("watching %s stopped, will resume: %s", what, reason)
            delay = retry_delay(
                failures, dice=self._dice(), retry_after=retry_after, cap=_WATCH_CAP
            )
            await asyncio.sleep(delay.total_seconds())

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    # --- JWT-SVIDs -----------------------------------------------------------------------------

    async def fetch_jwt_svid(self, audiences: Sequence[str]) -> JwtSvid:
        """A JWT-SVID for `audiences`: from the cache, or issued once however many ask.

        Raises:
            SourceError: there is no identity to issue it for.
            IdentityError: it could not be issued and no cached one is valid.
        """
        if not audiences or not all(audiences):
            raise RequestRejected(
                "a JWT-SVID needs at least one audience", reason="AUDIENCE_INVALID"
            )
        snapshot = self._holder.snapshot()
        key = (str(snapshot.spiffe_id), frozenset(audiences))
        denied = self._holder.denied
        cached = self._jwt_cache.fresh(key, denied=denied, now=utc_now())
        if cached is not None:
            return cached
        flight = self._jwt_flights.get(key)
        if flight is None:
            flight = asyncio.create_task(self._issue_jwt(key))
            self._jwt_flights[key] = flight
            flight.add_done_callback(lambda done: self._land(key, done))
        try:
            # Shielded: one caller giving up must not take the answer from the others.
            return await asyncio.shield(flight)
        except IdentityError as error:
            valid = self._jwt_cache.fallback(key, denied=denied, now=utc_now())
            if valid is None or isinstance(error, _DECIDED):
                raise
            return valid

    def _land(self, key: JwtKey, flight: asyncio.Task[JwtSvid]) -> None:
        self._jwt_flights.pop(key, None)
        if not flight.cancelled():
            flight.exception()  # Seen: whoever waited has it; nobody may have waited that long.

    async def _issue_jwt(self, key: JwtKey) -> JwtSvid:
        audiences = sorted(key[1])
        entry = self._entry or await self._choose_entry()
        try:
            message = await self._link.issue_jwt(entry, audiences)
        except NotPermitted as error:
            # The entry may have been replaced by another with the same SPIFFE ID.
            renewed = await self._choose_entry()
            if error.reason != "ENTRY_NOT_AUTHORIZED" or renewed.id == entry.id:
                raise
            message = await self._link.issue_jwt(renewed, audiences)
        try:
            svid = JwtSvid.parse_insecure(message.token, set(audiences))
        except PySpiffeError:
            # "from None": the parser's message could quote the token.
            raise ProtocolViolation("the broker sent a JWT-SVID that cannot be read") from None
        token = CachedToken(
            svid=svid,
            jti=message.jti,
            received=utc_now(),
            expires_at=time_from_wire(message.expires_at),
        )
        self._jwt_cache.put(key, token)
        return svid


def _report_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (bug := task.exception()) is not None:
        _logger.error("the identity source stopped renewing; this is a bug", exc_info=bug)
