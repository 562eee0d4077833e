"""What a process may have: attested, matched, and told again whenever it changes.

- A process is attested anew before every state it is given, and checked once more at the last
  moment: nobody is handed what was somebody else's.
- A watch is woken only by what concerns it: an entry its selectors match or may match, an SVID it
  uses, the bundle, the revocation lists.
- A state is never half: while an SVID is being made that will be there in a moment, it is waited
  for, but not for long.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from time import monotonic
from types import MappingProxyType
from typing import Final, Protocol

from identity_broker.agent.denied import TokenFacts
from identity_broker.agent.identity import (
    BundleState,
    Caller,
    JwtIdentity,
    WorkloadState,
)
from identity_broker.agent.instances import key_for
from identity_broker.agent.match import WatcherIndex
from identity_broker.agent.mirror import Changed, Mirror
from identity_broker.agent.svids import SvidKey, Svids
from identity_broker.agent.tokens import Tokens
from identity_broker.attestors.workload import Process
from identity_broker.domain.clock import Clock
from identity_broker.domain.selector import Selector
from identity_broker.errors import (
    AgentNotReady,
    AudienceInvalid,
    BrokerError,
    CallerUnknown,
    NoIdentity,
    TokenInvalid,
)
from identity_broker.telemetry.metrics import AgentMetrics
from identity_ca import errors as ca_errors
from identity_ca.bundle import TrustBundle
from identity_ca.jwt import VerifiedJwt, verify_jwt_svid
from identity_client.node.values import SyncedEntry

_SETTLE_SECONDS: Final = 0.25  # how long a state waits for SVIDs that are being made
_FIRST_SECONDS: Final = 10.0  # how long a caller waits for its first state
_ATTEST_AGAIN_SECONDS: Final = 5.0  # after an attestor failed
_MOST_AUDIENCES: Final = 32
_MOST_AUDIENCE_BYTES: Final = 512
_MOST_ROUNDS: Final = 3  # of ordering JWT-SVIDs while their entries change
_SYNC_SECONDS: Final = 1.0  # how long a caller waits for the broker's first word
# The broker tells of no other trust domain's bundle yet.
_NO_FEDERATION: Final[Mapping[str, TrustBundle]] = MappingProxyType({})


class Attested(Protocol):
    """What is known of a process."""

    @property
    def selectors(self) -> frozenset[Selector]:
        """What was vouched for."""
        ...

    @property
    def problems(self) -> tuple[str, ...]:
        """Attestors that could not tell, a sentence each."""
        ...


class Attests(Protocol):
    """Attests processes: `attestors.workload.attestation.Attestation`."""

    async def attest(
        self, process: Process, wanted: Mapping[str, frozenset[str]] | None
    ) -> Attested:
        """Ask the attestors that `wanted` names; all of them when None.

        Raises:
            CallerUnknown, ProcessChanged: as `Process.check`.
        """
        ...


@dataclass(eq=False, slots=True)
class _Watch:
    """One open stream.

    Attributes:
        ended: done when the caller is gone.
        woken: set when something that concerns it has changed.
        bundles: whether the bundle and the revocation lists concern it.
        keys: the SVIDs it uses, pinned.
        unsure: whether an attestor failed, so that its selectors are to be asked for again.
    """

    caller: Caller
    ended: asyncio.Future[None]
    bundles: bool
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    keys: frozenset[SvidKey] = frozenset()
    unsure: bool = False

    def check(self) -> None:
        """Make sure that the caller is there, and the same.

        Raises:
            CallerUnknown, ProcessChanged: as `Caller.check`.
        """
        if self.ended.done():
            raise CallerUnknown(detail="the process or its connection has ended")
        self.caller.check()

    async def pause(self, seconds: float | None) -> None:
        """Wait until woken, or for so long.

        Raises:
            CallerUnknown: the caller is gone.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.woken.wait()
        if self.ended.done():
            raise CallerUnknown(detail="the process or its connection has ended")


class Identities:
    """Implements `identity.WorkloadIdentities`. Belongs to one event loop.

    Args:
        wake: told when there is something to order.
        bundles_for_all: whether a process that matches nothing gets the bundles.
        first_seconds: how long a caller waits for its first state.
    """

    def __init__(  # what it joins
        self,
        *,
        mirror: Mirror,
        svids: Svids,
        tokens: Tokens,
        attestation: Attests,
        clock: Clock,
        metrics: AgentMetrics,
        wake: Callable[[], None],
        bundles_for_all: bool = False,
        first_seconds: float = _FIRST_SECONDS,
    ) -> None:
        self._mirror = mirror
        self._svids = svids
        self._tokens = tokens
        self._attestation = attestation
        self._clock = clock
        self._metrics = metrics
        self._wake = wake
        self._bundles_for_all = bundles_for_all
        self._first_seconds = first_seconds
        self._watchers: WatcherIndex[_Watch] = WatcherIndex()
        self._watches: set[_Watch] = set()
        self._by_key: dict[SvidKey, set[_Watch]] = {}
        self._revision = 0
        self._withdrawn = False

    # --- what happened ------------------------------------------------------------------------

    def changed(self, change: Changed) -> None:
        """The mirror changed: wake whom it concerns."""
        concerned: set[_Watch] = set()
        if change.bundle or change.crls:
            concerned.update(watch for watch in self._watches if watch.bundles)
        for each in change.entries:
            for entry in (each.old, each.new):
                if entry is not None:
                    concerned |= self._watchers.concerned(entry.selectors)
        for watch in concerned:
            watch.woken.set()

    def svids_changed(self, keys: Collection[SvidKey]) -> None:
        """SVIDs came, went or failed: wake whoever uses them."""
        for key in keys:
            for watch in self._by_key.get(key, ()):
                watch.woken.set()

    def withdraw(self, *, withdrawn: bool) -> None:
        """Hand out nothing any more, or again."""
        if self._withdrawn != withdrawn:
            self._withdrawn = withdrawn
            for watch in self._watches:
                watch.woken.set()

    # --- what is asked: see `identity.WorkloadIdentities` ---------------------------------------

    async def watch(self, caller: Caller) -> AsyncIterator[WorkloadState]:
        """See `WorkloadIdentities.watch`."""
        told: WorkloadState | None = None
        deadline: float | None = monotonic() + self._first_seconds
        with self._watching(caller) as watch:
            while True:
                state = await self._settled(watch, deadline)
                deadline = None
                if state != told:
                    watch.check()
                    told = state
                    self._revision += 1
                    yield replace(state, revision=self._revision)
                await watch.pause(_ATTEST_AGAIN_SECONDS if watch.unsure else None)

    async def watch_bundles(self, caller: Caller) -> AsyncIterator[BundleState]:
        """See `WorkloadIdentities.watch_bundles`."""
        told: BundleState | None = None
        with self._watching(caller) as watch:
            while True:
                watch.woken.clear()
                await self._synced(watch)
                await self._match(watch, may_be_nobody=self._bundles_for_all)
                state = BundleState(self._bundle(), _NO_FEDERATION, self._mirror.crls)
                if state != told:
                    watch.check()
                    told = state
                    yield state
                await watch.pause(_ATTEST_AGAIN_SECONDS if watch.unsure else None)

    async def watch_name(self, caller: Caller) -> AsyncIterator[str]:
        """Yield the caller's SPIFFE ID, the default one, at once and whenever it is another.

        Raises:
            NoIdentity, AgentNotReady, CallerUnknown, ProcessChanged: as `watch`.
        """
        told: str | None = None
        with self._watching(caller, bundles=False) as watch:
            while True:
                watch.woken.clear()
                await self._synced(watch)
                name = (await self._match(watch))[0].spiffe_id
                if name != told:
                    watch.check()
                    told = name
                    yield name
                await watch.pause(_ATTEST_AGAIN_SECONDS if watch.unsure else None)

    async def jwt_svids(
        self, caller: Caller, audiences: Sequence[str], spiffe_id: str | None
    ) -> list[JwtIdentity]:
        """See `WorkloadIdentities.jwt_svids`."""
        _check_audiences(audiences)
        self._bundle()
        selectors = (await self._attested(caller))[0]
        entries = self._entries_for_jwt(selectors, caller, spiffe_id)
        for _ in range(_MOST_ROUNDS):
            fresh = [token for each in entries if (token := self._tokens.fresh(each, audiences))]
            if len(fresh) == len(entries):
                return fresh  # nothing was awaited since the process was looked at
            came = await self._jwt_svids_of(entries, audiences)
            caller.check()
            self._bundle()
            before, entries = entries, self._entries_for_jwt(selectors, caller, spiffe_id)
            if entries == before:
                return came
        raise AgentNotReady("what this process is registered for keeps changing", retry_after=1.0)

    async def validate_jwt(self, caller: Caller, token: str, audience: str) -> VerifiedJwt:
        """See `WorkloadIdentities.validate_jwt`."""
        bundle = self._bundle()
        try:
            verified = verify_jwt_svid(
                token, bundle=bundle, audience=audience, now=self._clock.now()
            )
        except ca_errors.AudienceInvalid as exc:
            raise AudienceInvalid(exc.message) from exc
        except ca_errors.CAError as exc:
            raise TokenInvalid(exc.message) from exc
        if self._mirror.denied.refuses(TokenFacts.of(verified)):
            raise TokenInvalid("the JWT-SVID is revoked")
        caller.check()
        return verified

    async def explain(self, process: Process) -> Attested:
        """Attest a process with every attestor there is."""
        return await self._attestation.attest(process, None)

    # --- a watch ------------------------------------------------------------------------------

    @contextmanager
    def _watching(self, caller: Caller, *, bundles: bool = True) -> Iterator[_Watch]:
        ended = asyncio.ensure_future(caller.ended())
        watch = _Watch(caller, ended, bundles)
        ended.add_done_callback(lambda _: watch.woken.set())
        self._watches.add(watch)
        self._metrics.agent_watches.inc()
        try:
            yield watch
        finally:
            self._metrics.agent_watches.dec()
            self._watches.discard(watch)
            self._watchers.drop(watch)
            self._use(watch, {})
            if not ended.cancel() and not ended.cancelled():
                ended.exception()  # Seen: whatever it was, the watch is over.

    async def _settled(self, watch: _Watch, deadline: float | None) -> WorkloadState:
        """The state, once it has an SVID and none that will be there in a moment is missing."""
        settle_until: float | None = None
        while True:
            watch.woken.clear()
            await self._synced(watch)
            entries = await self._match(watch)
            state = self._state(watch, entries)
            making = self._is_making(watch, state)
            if state.identities:
                settle_until = settle_until or monotonic() + _SETTLE_SECONDS
                if not making or monotonic() >= settle_until:
                    return state
                await watch.pause(settle_until - monotonic())
            elif deadline is None:
                await watch.pause(None)
            elif making and monotonic() < deadline:
                await watch.pause(deadline - monotonic())
            else:
                raise self._no_svid(watch)

    async def _synced(self, watch: _Watch) -> None:
        """Wait a moment for the broker's first word.

        Raises:
            AgentNotReady: it did not come.
        """
        deadline = monotonic() + _SYNC_SECONDS
        while not (self._mirror.synced or self._withdrawn) and monotonic() < deadline:
            await watch.pause(deadline - monotonic())
            watch.woken.clear()
        self._bundle()

    async def _match(self, watch: _Watch, *, may_be_nobody: bool = False) -> list[SyncedEntry]:
        """Attest the caller and look its entries up; changes from here on wake the watch.

        Raises:
            NoIdentity: nothing matches.
            AgentNotReady, CallerUnknown, ProcessChanged.
        """
        while True:
            kinds = self._mirror.kinds
            selectors, problems = await self._attested(watch.caller)
            if self._mirror.kinds == kinds:
                break  # Otherwise an entry asks for what was not looked at.
        watch.unsure = bool(problems)
        self._watchers.place(watch, selectors, kinds)
        self._bundle()
        entries = self._allowed(selectors, watch.caller)
        if not entries and not may_be_nobody:
            raise NoIdentity(selectors=sorted(selectors), problems=problems)
        return entries

    def _entries_for_jwt(
        self, selectors: frozenset[str], caller: Caller, spiffe_id: str | None
    ) -> list[SyncedEntry]:
        """The entries a JWT-SVID is made for, the default first as among X.509-SVIDs (API-20).

        Raises:
            NoIdentity: there is none.
        """
        entries = self._allowed(selectors, caller)
        wanted: dict[tuple[str, str], SyncedEntry] = {}
        for entry in entries:
            if spiffe_id in (None, entry.spiffe_id):
                wanted.setdefault((entry.spiffe_id, entry.hint), entry)
        if not wanted:
            raise NoIdentity(
                "this process is not registered for that SPIFFE ID"
                if entries
                else NoIdentity.sentence
            )
        return [*wanted.values()]

    async def _jwt_svids_of(
        self, entries: Sequence[SyncedEntry], audiences: Sequence[str]
    ) -> list[JwtIdentity]:
        if len(entries) == 1:  # mostly: no tasks for it
            return [await self._tokens.get(entries[0], audiences)]
        return _whatever_came(
            await asyncio.gather(
                *(self._tokens.get(entry, audiences) for entry in entries),
                return_exceptions=True,
            )
        )

    async def _attested(self, caller: Caller) -> tuple[frozenset[str], tuple[str, ...]]:
        started = monotonic()
        attested = await self._attestation.attest(caller.process, self._mirror.wanted())
        self._metrics.agent_attest_seconds.observe(monotonic() - started)
        return frozenset(map(str, attested.selectors)), attested.problems

    def _allowed(self, selectors: frozenset[str], caller: Caller) -> list[SyncedEntry]:
        """The entries that match, without those whose SVID this very process lost."""
        return [
            entry
            for entry in self._mirror.match(selectors, self._clock.now())
            if not self._svids.is_denied(key_for(entry, caller.process))
        ]

    def _state(self, watch: _Watch, entries: Sequence[SyncedEntry]) -> WorkloadState:
        """All that the caller may know now; what is missing is wanted from here on."""
        now = self._clock.now()
        keys = {key_for(entry, watch.caller.process): entry for entry in entries}
        self._use(watch, keys)
        found = (self._svids.usable(key, entry, now) for key, entry in keys.items())
        return WorkloadState(
            identities=tuple(identity for identity in found if identity is not None),
            bundle=self._bundle(),
            federated=_NO_FEDERATION,
            crls=self._mirror.crls,
            revision=0,
        )

    def _use(self, watch: _Watch, keys: Mapping[SvidKey, SyncedEntry]) -> None:
        """Pin the SVIDs the watch uses now, and let the others go."""
        now = self._clock.now()
        before, watch.keys = watch.keys, frozenset(keys)
        for key, entry in keys.items():
            if key in before:
                self._svids.want(key, entry, now)
            else:
                self._svids.pin(key, entry, now)
                self._by_key.setdefault(key, set()).add(watch)
        for key in before - watch.keys:
            self._svids.unpin(key)
            users = self._by_key[key]
            users.discard(watch)
            if not users:
                del self._by_key[key]
        if any(map(self._svids.is_pending, keys)):
            self._wake()

    def _is_making(self, watch: _Watch, state: WorkloadState) -> bool:
        """Whether an SVID that the state lacks may be there in a moment."""
        there = {identity.entry_id for identity in state.identities}
        return any(self._svids.is_hopeful(key) for key in watch.keys if key.entry_id not in there)

    def _no_svid(self, watch: _Watch) -> AgentNotReady:
        failures = [failure for key in watch.keys if (failure := self._svids.failure(key))]
        if not failures:
            return AgentNotReady("the SVID could not be had in time", retry_after=1.0)
        return AgentNotReady(
            "the SVID cannot be had from the broker now",
            detail=f"{failures[0].reason}: {failures[0].message}",
            retry_after=1.0,
        )

    def _bundle(self) -> TrustBundle:
        """The bundle.

        Raises:
            NoIdentity: the broker withdrew everything.
            AgentNotReady: it was not heard yet.
        """
        if self._withdrawn:
            raise NoIdentity("this machine may hand out no identity any more")
        bundle = self._mirror.bundle
        if bundle is None:
            raise AgentNotReady("the agent has not heard from its broker yet", retry_after=1.0)
        return bundle


def _check_audiences(audiences: Sequence[str]) -> None:
    if not 1 <= len(audiences) <= _MOST_AUDIENCES or not all(
        1 <= len(audience.encode("utf-8", "surrogatepass")) <= _MOST_AUDIENCE_BYTES
        for audience in audiences
    ):
        raise AudienceInvalid


def _whatever_came(answers: Sequence[JwtIdentity | BaseException]) -> list[JwtIdentity]:
    """The tokens there are; the first failure when there is none.

    Raises:
        BrokerError: no token could be had.
    """
    came = [answer for answer in answers if not isinstance(answer, BaseException)]
    for answer in answers:
        # A bug, or the end of this call, is not to be passed over.
        if isinstance(answer, BaseException) and not (came and isinstance(answer, BrokerError)):
            raise answer
    return came
