"""Keeps a machine a node: attests it, renews its SVID, and proves it again when it is lost.

- One way for everybody: an identity source and the node agent are both built on this.
- What is valid stays in use whatever fails. A node that seems lost is asked after before it is
  given up, and a new proof replaces the old SVID only once the broker has accepted it.
- A refusal of any call counts: a broker that does not know this node any more, or has banned it,
  says so first to whoever asks first.
- A state directory that cannot be written stops nothing; the status says so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from datetime import timedelta
from typing import Any, TypeVar

from identity_api.broker.v1 import types_pb2
from identity_client._wire.convert import bundle_from_wire
from identity_client.clock import roll, utc_now
from identity_client.credential import BundleSnapshot, X509Material
from identity_client.errors import (
    IdentityError,
    ProtocolViolation,
    SettingsInvalid,
    SourceClosed,
)
from identity_client.keys import KeyPair
from identity_client.link import REPLACED, BrokerLink, issued_material
from identity_client.node.batches import in_batches, past_epochs
from identity_client.node.follow import Follower
from identity_client.node.kept import KeptNode, NodeMemory
from identity_client.node.reports import Reports
from identity_client.node.settings import NodeSettings
from identity_client.node.standing import (
    BANNED,
    NO_ANSWER,
    NODE_LOST,
    TLS_FAILED,
    Doubt,
    HeldNode,
    phase_of,
    rest_after,
    rest_before_due,
)
from identity_client.node.trust import NodeTrust
from identity_client.node.values import (
    IssuedJwt,
    IssuedX509,
    JwtRequest,
    NodeStatus,
    SyncEvent,
    SyncPosition,
    Verifier,
    X509Request,
)
from identity_client.renewal import retry_delay

__all__ = ["NodeKeeper"]

_logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_INSIST_SECONDS = 1.0
_PATIENCE = 5


class NodeKeeper:
    """One node of one broker. Belongs to one event loop.

    Args:
        settings: where the broker is and how to prove what this machine is.
        on_change: called on the loop whenever `status` or `bundle` has changed.
        dice: uniform in [0, 1).
    """

    def __init__(
        self,
        settings: NodeSettings,
        *,
        on_change: Callable[[], None] = lambda: None,
        dice: Callable[[], float] = roll,
    ) -> None:
        self._settings = settings
        self._on_change = on_change
        self._dice = dice
        self._link = BrokerLink(settings)
        self._memory = NodeMemory(settings.state_dir, settings.domain)
        self._unsaved = False
        self._trust = NodeTrust(settings)
        self._node: HeldNode | None = None
        self._error: IdentityError | None = None
        self._doubt = Doubt.NONE
        self._vain_doubts = 0
        self._unanswered = 0
        self._closed = False
        self._wake = asyncio.Event()
        self._connected = asyncio.Event()
        self._moved = asyncio.Event()
        self._changed = asyncio.Event()
        self._told: tuple[NodeStatus, BundleSnapshot | None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._follower: Follower | None = None
        self._token_untried = False
        self._reports = Reports()

    # --- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Reads the trust anchors and the kept state, and starts to keep the node.

        Raises:
            SettingsInvalid: a file cannot be read or used, or another process has the directory.
        """
        try:
            await self._trust.begin()
        except SettingsInvalid:
            raise
        except IdentityError as error:
            self._error = error  # Asked again by the loop; kept state may make it needless.
        kept = await self._memory.open()
        if kept is not None:
            self._trust.take(kept.bundle, kept.bundle_message)
            # Renewed at once: how much of its life was used is not known, and it proves that the
            # broker still knows this node.
            self._node = HeldNode(kept.material, utc_now(), 0.0, kept.reattestable)
            self._connect(self._node)
            self._token_untried = not self._settings.attestor.renewable
        self._task = asyncio.create_task(self._keep(), name="identity-node")
        self._task.add_done_callback(_report_bug)

    async def close(self) -> None:
        """Ends every call and connection; what is kept on disk stays."""
        self._closed = True
        if self._follower is not None:
            self._follower.stop()
        pending: set[asyncio.Task[Any]] = {self._task} if self._task is not None else set()
        while pending:
            # More than once: a library that ends a call may swallow the first.
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=_INSIST_SECONDS)
        await self._link.close()
        self._memory.close()
        for waited_for in (self._connected, self._moved, self._changed):
            waited_for.set()  # Whoever waits learns that it is over.

    @property
    def status(self) -> NodeStatus:
        """The node's health at this moment."""
        node, error = self._node, self._error
        if error is None and self._follower is not None:
            error = self._follower.error
        return NodeStatus(
            phase=phase_of(node, error),
            node_id=str(node.material.spiffe_id) if node else "",
            serial=node.material.serial if node else "",
            expires_at=node.material.not_after if node else None,
            last_error=error,
            state_problem=self._memory.problem,
        )

    @property
    def bundle(self) -> BundleSnapshot | None:
        """The newest trust bundle; None until there is one to trust."""
        return self._trust.bundle

    # --- calls ---------------------------------------------------------------------------------

    async def attested(self) -> None:
        """Returns once there is a node SVID to make calls with.

        Raises:
            SourceClosed: there never will be.
        """
        await self._connected.wait()
        self._refuse_closed()

    async def attested_or_banned(self, told: IdentityError | None) -> IdentityError | None:
        """As `attested`, or the refusal of a banned node that has no SVID; but not `told` again."""
        while not self._connected.is_set():
            error, changed = self._error, self._changed
            if error is not None and error.reason == BANNED and error is not told:
                return error
            await changed.wait()
            self._refuse_closed()
        self._refuse_closed()
        return None

    async def issue_x509(self, orders: Sequence[X509Request]) -> list[IssuedX509 | IdentityError]:
        """X.509-SVIDs, or why not, for each order, in order; never raises for a refusal.

        What is returned is unchecked: whoever ordered knows the key and whom it must name.
        """
        return await in_batches(orders, lambda batch: self.ask(lambda link: link.issue_x509(batch)))

    async def issue_jwt(self, orders: Sequence[JwtRequest]) -> list[IssuedJwt | IdentityError]:
        """JWT-SVIDs, or why not, for each order, in order; never raises for a refusal."""
        return await past_epochs(
            orders,
            lambda some: in_batches(
                some, lambda batch: self.ask(lambda link: link.issue_jwt(batch))
            ),
        )

    async def ask(self, call: Callable[[BrokerLink], Awaitable[_T]]) -> _T:
        """Makes one call; what its failure says of the node is taken to heart.

        Raises:
            IdentityError: what the call raised.
        """
        serial = self.serial
        try:
            answer = await call(self._link)
        except IdentityError as error:
            self.heard_refusal(error, serial)
            raise
        self.heard()
        return answer

    async def watch(
        self, open_stream: Callable[[BrokerLink], AsyncIterator[_T]]
    ) -> AsyncIterator[_T]:
        """One stream, from now until it ends.

        Raises:
            IdentityError: what the stream raised; reason CONNECTION_REPLACED when it only has to
                be opened again.
        """
        serial = self.serial
        try:
            async for message in open_stream(self._link):
                self.heard()
                yield message
        except IdentityError as error:
            self.heard_refusal(error, serial)
            raise

    async def follow(self, position: Callable[[], SyncPosition]) -> AsyncGenerator[SyncEvent, None]:
        """What concerns this node, now and as it changes, until the keeper is closed.

        The stream is opened again by itself, from where `position` says that the node stands; in
        between comes a SyncLost. Whoever iterates applies an update and awaits its `ack()` before
        asking for the next.

        Args:
            position: called for every opening.
        """
        if self._follower is not None:
            raise RuntimeError("this node is being followed already")
        self._follower = Follower(
            self, self._settings, self._link, position, self._reports, self._dice
        )
        try:
            async with aclosing(self._follower.events()) as events:
                async for event in events:
                    self._tell()
                    yield event
                    del event
        finally:
            self._follower = None

    def resync(self) -> None:
        """Drops the stream of `follow`; the next begins with the full state."""
        if self._follower is not None:
            self._follower.resync()

    def report_verifiers(self, verifiers: Callable[[], Sequence[Verifier]]) -> None:
        """Tells the broker who follows revocations through this node; call it at every change.

        It is told on the stream of `follow`, changes within 50 ms together; of at most 1,000.

        Args:
            verifiers: all there are; called when they are told.
        """
        self._reports.change(verifiers)

    async def refresh_bundle(self) -> BundleSnapshot:
        """Asks for the bundle now; raises IdentityError when it cannot be had."""
        return self.learn_bundle(await self.ask(lambda link: link.get_bundle()))

    async def checked(
        self, chain: Sequence[bytes], pair: KeyPair, *, hint: str = ""
    ) -> tuple[X509Material, BundleSnapshot]:
        """A chain issued for the key of `pair`, checked, and the bundle it leads to.

        Raises:
            ProtocolViolation: it cannot be used.
            IdentityError: it may lead to a newer bundle, which could not be asked for.
        """
        bundle = self._trust.current
        try:
            return issued_material(chain, pair, bundle, hint), bundle
        except ProtocolViolation as error:
            if error.reason != "CHAIN_UNTRUSTED":
                raise
            # The authority was rotated and its bundle has not reached us yet: ask for it.
            newer = self.learn_bundle(await self._link.get_bundle())
            return issued_material(chain, pair, newer, hint), newer

    def learn_bundle(self, message: types_pb2.TrustBundle) -> BundleSnapshot:
        """The broker's bundle, used and kept from now on.

        Raises:
            ProtocolViolation: it cannot be read, or is another trust domain's.
        """
        bundle = bundle_from_wire(message, self._settings.domain)
        octets = message.SerializeToString(deterministic=True)
        if octets != self._trust.message:
            self._unsaved = True
            self._wake.set()
        if self._trust.take(bundle, octets):
            self._reconnect()
            self._tell()
        return bundle

    @property
    def moved(self) -> asyncio.Event:
        """Set once there is another connection than now."""
        return self._moved

    async def pause(self, delay: timedelta, moved: asyncio.Event) -> None:
        """Waits for `delay`, but not beyond `moved`.

        Raises:
            SourceClosed: there is nothing to wait for any more.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(delay.total_seconds()):
                await moved.wait()
        self._refuse_closed()

    # --- what calls say of the node ------------------------------------------------------------

    @property
    def serial(self) -> str:
        """The serial number that calls are made with now; empty for none."""
        return self._node.material.serial if self._node else ""

    def heard(self) -> None:
        """The broker answered this node as it should."""
        self._unanswered = 0
        self._vain_doubts = 0

    def heard_refusal(self, error: IdentityError, serial: str) -> None:
        """A call made with the SVID `serial` failed."""
        if error.reason == REPLACED or not serial or serial != self.serial:
            return  # It says nothing of the SVID that is in use now.
        if error.reason in NO_ANSWER:
            self._unanswered += 1
            if error.reason == TLS_FAILED or self._unanswered >= _PATIENCE:
                self._doubts(Doubt.CONNECTION)
            return
        self._unanswered = 0
        if error.reason == BANNED or error.reason in NODE_LOST:
            if error.reason == BANNED:
                self._error = error
            self._doubts(Doubt.IDENTITY)
            self._tell()

    def heard_denied(self, authorities: Sequence[str]) -> None:
        """Signatures of these authorities are refused: a node SVID of theirs is replaced."""
        if self._node is not None and self._node.authority_id in authorities:
            self._doubts(Doubt.IDENTITY)

    def _doubts(self, doubt: Doubt) -> None:
        if self._doubt is not Doubt.IDENTITY:
            self._doubt = doubt
        self._wake.set()

    # --- the loop ------------------------------------------------------------------------------

    async def _keep(self) -> None:
        failures = 0
        while True:
            self._wake.clear()
            try:
                await self._advance(failures)
            except IdentityError as error:
                failures += 1
                self._error = error
                _logger.warning("keeping the node failed (%d): %s", failures, error)
                if error.reason == TLS_FAILED and await self._trust.widen():
                    self._reconnect()
            except Exception as bug:
                # An attestor's or the anchors' callable: its bug must not end the node's renewal.
                _logger.exception("keeping the node failed; this is a bug")
                failures += 1
                self._error = IdentityError(f"keeping the node failed: {type(bug).__name__}")
            else:
                failures = 0
                self._error = None
            self._tell()
            if failures:
                # Not to be woken: what is heard meanwhile is no reason to ask more often.
                rest = rest_after(failures, self._error, self._node, dice=self._dice())
                await asyncio.sleep(rest.total_seconds())
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(rest_before_due(self._node).total_seconds()):
                    await self._wake.wait()
            if self._vain_doubts > 1:
                delay = retry_delay(self._vain_doubts - 1, dice=self._dice())
                await asyncio.sleep(delay.total_seconds())

    async def _advance(self, failures: int) -> None:
        await self._trust.begin()
        node, doubt = self._node, self._doubt
        if node is None or node.has_expired:
            # An expired one stays until there is another: it may be the clock that is wrong.
            self._connected.clear()
            await self._attest()
        else:
            if not self._connected.is_set():
                self._connect(node)
            try:
                if node.is_due or doubt is Doubt.IDENTITY:
                    await self._renew(node)
                elif doubt is Doubt.CONNECTION:
                    self.learn_bundle(await self._link.get_bundle())
            except IdentityError as error:
                if self._token_untried and error.reason in NODE_LOST:
                    await self._try_token(error)
                elif self._may_help_to_attest(node, error, failures):
                    _logger.warning("attesting again: %s", error)
                    if error.reason in NODE_LOST:
                        self._node = None
                        self._connected.clear()
                    # Else beside the SVID we have: if it is the broker that is away, nothing is
                    # lost.
                    await self._attest()
                else:
                    raise
            self._vain_doubts += doubt is not Doubt.NONE
        self._doubt = Doubt.NONE
        self._unanswered = 0
        await self._save()

    def _may_help_to_attest(self, node: HeldNode, error: IdentityError, failures: int) -> bool:
        if not self._settings.attestor.renewable:
            # A spent token cannot attest again; the broker's own refusal says more than "spent".
            return False
        if error.reason in NODE_LOST:
            return True
        # A broker that does not trust our certificate any more cannot say so: TLS merely breaks.
        return node.reattestable and error.reason in NO_ANSWER and failures >= _PATIENCE

    async def _try_token(self, lost: IdentityError) -> None:
        """Attests a node whose kept SVID is of no use by the token it was started with."""
        try:
            await self._attest()
        except IdentityError as error:
            if error.reason in NO_ANSWER:
                raise
            self._token_untried = False
            # It is the old one: that the node is lost says more than "spent".
            raise lost from error

    async def _attest(self) -> None:
        attested = await self._link.attest(self._trust.roots)
        _logger.info("node attested: %s", attested.material.spiffe_id)
        self._trust.take(attested.bundle, attested.bundle_message)
        self._token_untried = False
        self._adopt(attested.material, reattestable=attested.reattestable)

    async def _renew(self, node: HeldNode) -> None:
        pair = KeyPair()
        svid = await self._link.renew_node(pair.csr())
        material, _ = await self.checked(svid.cert_chain, pair)
        if material.spiffe_id != node.material.spiffe_id:
            raise ProtocolViolation("the broker renewed this node as another one")
        self._adopt(material, reattestable=node.reattestable)
        if self._trust.widened:
            self.learn_bundle(await self._link.get_bundle())

    def _adopt(self, material: X509Material, *, reattestable: bool) -> None:
        self._node = HeldNode.received(material, reattestable=reattestable, dice=self._dice())
        self._unsaved = True
        self._connect(self._node)

    def _connect(self, node: HeldNode) -> None:
        self._link.connect(node.material, self._trust.roots)
        self._connected.set()
        before, self._moved = self._moved, asyncio.Event()
        before.set()
        self._tell()

    def _reconnect(self) -> None:
        if self._node is not None and self._connected.is_set():
            self._connect(self._node)

    def _tell(self) -> None:
        now = (self.status, self.bundle)
        if now == self._told:
            return
        self._told = now
        before, self._changed = self._changed, asyncio.Event()
        before.set()
        try:
            self._on_change()
        except Exception:  # Foreign code: its bug must not end the node's renewal.
            _logger.exception("whoever follows the node's status failed")

    def _refuse_closed(self) -> None:
        if self._closed:
            raise SourceClosed("the node's keeper is closed")

    async def _save(self) -> None:
        node = self._node
        if node is None or not (self._unsaved or self._memory.problem):
            return
        self._unsaved = False
        await self._memory.save(
            KeptNode(node.material, self._trust.current, self._trust.message, node.reattestable)
        )


def _report_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (bug := task.exception()) is not None:
        _logger.error("the node is not renewed any more; this is a bug", exc_info=bug)
