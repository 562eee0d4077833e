"""The last step of a revocation: a signed statement of what was revoked and who acknowledged it.

- An order is closed when it is committed and swept, and every verifier that was connected has
  acknowledged it or `acknowledge_timeout` has passed. What a crash left is closed after the next
  start; what a key manager or a database that is away delays is tried again.
- A statement is composed once: what becomes known later stands in `idb revoke status` alone.
- Bounded: ids are named up to `MOST_IDS`, but always counted and digested; verifiers as long as
  there is room, the silent ones and those away first, and always counted.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from identity_broker.domain import names
from identity_broker.domain.clock import Clock
from identity_broker.domain.events import AuditEvent, AuditKind
from identity_broker.domain.paging import MAX_PAGE_SIZE, CredentialFilter
from identity_broker.domain.revocation import OrderState, RevocationOrder
from identity_broker.errors import BrokerError, DependencyError
from identity_broker.lifecycle.propagation import Propagation
from identity_broker.lifecycle.propagation_report import (
    OBJECTIVE,
    PropagationReport,
    VerifierStanding,
    VerifierState,
)
from identity_broker.signing import Signing
from identity_broker.signing.statement import sign_revocation_statement
from identity_broker.store import Repositories, Store
from identity_broker.telemetry.logs import get_logger

_log = get_logger("statement")

VERSION = 1
MOST_IDS = 1000
"""Credentials, and entries on hold, that are named."""
MOST_VERIFIER_OCTETS = 2 * 1024 * 1024
"""Room for verifiers; some ten thousand of them."""

# Orders that another broker is closing, or was when it ended.
_OTHERS = timedelta(seconds=10)
_LOOK_SECONDS = 10.0
_RETRY_SECONDS = 1.0
_MOST_RETRY_SECONDS = 30.0
_VERIFIER_OCTETS = 160
_MOST_LOGGED = 10


@dataclass(frozen=True, slots=True)
class RevokedIds:
    """The credentials that an order revoked.

    Attributes:
        count: how many.
        sha256: of all ids, sorted, each with a newline behind it; hexadecimal.
        first: the first of them, sorted; at most `MOST_IDS`.
    """

    count: int
    sha256: str
    first: tuple[str, ...]

    @classmethod
    def of(cls, ids: Sequence[str]) -> RevokedIds:
        """Count and digest ids, in any order."""
        ordered = sorted(ids)
        digest = hashlib.sha256()
        for one in ordered:
            digest.update(f"{one}\n".encode())
        return cls(len(ordered), digest.hexdigest(), tuple(ordered[:MOST_IDS]))


class Statements:
    """Closes orders.

    Args:
        acknowledge_timeout: how long verifiers are waited for, from the commit on.
        monotonic: seconds that only grow.
    """

    def __init__(
        self,
        *,
        store: Store,
        signing: Signing,
        propagation: Propagation,
        clock: Clock,
        acknowledge_timeout: timedelta,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._signing = signing
        self._propagation = propagation
        self._clock = clock
        self._timeout = acknowledge_timeout
        self._monotonic = monotonic
        self._open = True
        self._look_at = 0.0
        self._failures = 0

    def committed(self, _order: RevocationOrder) -> None:
        """There is an order to be closed soon."""
        self._open = True
        if not self._failures:
            self._look_at = 0.0

    async def run(self) -> None:
        """Close the orders whose time has come; called every second.

        Raises:
            BrokerError: some could not be closed now.
        """
        now = self._monotonic()
        if now < self._look_at:
            return
        if not self._open and not self._failures:
            self._look_at = now + _LOOK_SECONDS
        try:
            await self._close_due()
        except BrokerError:
            self._failures += 1
            pause = _RETRY_SECONDS * 2 ** min(self._failures, 10)
            self._look_at = self._monotonic() + min(pause, _MOST_RETRY_SECONDS)
            raise
        self._failures = 0

    async def _close_due(self) -> None:
        self._open = False
        failed: BrokerError | None = None
        for order in await self._store.read(lambda repos: repos.orders.unfinished()):
            await self._propagation.look(order)
            if not self._is_due(order):
                self._open = True
                continue
            try:
                await self._close(order)
            except DependencyError:
                raise  # it would be the same with the next one
            except BrokerError as error:
                _log.error(
                    "revocation not closed",
                    subject=str(order.subject),
                    reason=error.reason,
                    detail=error.detail,
                )
                failed = error
        if failed is not None:
            raise failed

    def _is_due(self, order: RevocationOrder) -> bool:
        if order.state is not OrderState.COMMITTED or not order.swept:
            return False
        if self._propagation.is_settled(order):
            return True
        patience = self._timeout
        if not self._propagation.has_seen(order):
            patience += _OTHERS
        since = order.committed_at or order.ordered_at
        # A clock that was set back must not keep it open.
        return not timedelta() <= self._clock.now() - since < patience

    async def _close(self, order: RevocationOrder) -> None:
        trust_domain = self._signing.trust_domain
        held = await self._store.read(lambda repos: _held(repos, order))
        report = await self._propagation.report(order)
        payload = compose(
            order,
            RevokedIds.of(await self._revoked_ids(order.id)),
            held,
            report,
            trust_domain=trust_domain.name,
            broker_id=str(names.broker_id(trust_domain)),
            now=self._clock.now(),
        )
        statement = await sign_revocation_statement(self._signing, payload)

        def write(repos: Repositories) -> bool:
            current = repos.orders.get(order.id)
            if current.state is not OrderState.COMMITTED:
                return False  # another broker was first
            repos.orders.update(replace(current, state=OrderState.CLOSED, statement=statement))
            repos.audit.append(
                AuditEvent(
                    at=self._clock.now(),
                    kind=AuditKind.REVOCATION_CLOSED,
                    actor=str(names.broker_id(trust_domain)),
                    subject=order.id,
                    facts={
                        "told": str(report.told),
                        "acknowledged": str(report.acknowledged),
                        "away": str(report.away),
                        "statement_sha256": hashlib.sha256(statement.encode()).hexdigest(),
                    },
                )
            )
            return True

        if await self._store.write(write):
            self._propagation.close(order)
            _say(order, report)

    async def _revoked_ids(self, order_id: str) -> list[str]:
        """Everything that the order revoked and that was not released, a page at a time."""
        ids: list[str] = []
        wanted, before = CredentialFilter(order_id=order_id), ""
        while True:
            page = await self._store.read(
                lambda repos, key=before: repos.credentials.page(wanted, key, MAX_PAGE_SIZE)  # type: ignore[misc]
            )
            ids.extend(credential.id for credential in page.items)
            before = page.next_key
            if not before:
                return ids


def _say(order: RevocationOrder, report: PropagationReport) -> None:
    missing = [
        one.verifier.label
        for one in report.verifiers[:_MOST_LOGGED]
        if one.state is not VerifierState.ACKNOWLEDGED
    ]
    subject, count = str(order.subject), report.acknowledged
    if missing:
        _log.warning("revocation closed unheard", subject=subject, count=count, names=missing)
    else:
        _log.info("revocation closed", subject=subject, count=count)


def compose(
    order: RevocationOrder,
    revoked: RevokedIds,
    held_entry_ids: Sequence[str],
    report: PropagationReport,
    *,
    trust_domain: str,
    broker_id: str,
    now: datetime,
) -> dict[str, Any]:
    """What is stated; times are RFC 3339 in UTC, to the millisecond."""
    verifiers = _verifiers(report)
    return {
        "version": VERSION,
        "trust_domain": trust_domain,
        "broker": broker_id,
        "issued_at": _time(now),
        "revocation": {
            "id": order.id,
            "subject": {"kind": order.subject.kind.value, "value": order.subject.value},
            "reason": order.reason.name.lower(),
            "comment": order.comment,
            "actor": order.actor,
            "ordered_at": _time(order.ordered_at),
            "committed_at": _time(order.committed_at),
            "sequence": order.sequence,
            "revoked": order.revoked,
            "already_revoked": order.already_revoked,
            "expired": order.expired,
            "released": order.released,
            "hold": order.hold,
            "held_entry_ids": list(held_entry_ids),
        },
        "credentials": {
            "count": revoked.count,
            "sha256": revoked.sha256,
            "ids": list(revoked.first),
        },
        "propagation": {
            "told": report.told,
            "acknowledged": report.acknowledged,
            "silent": report.silent,
            "gone": report.gone,
            "away": report.away,
            "p50_ms": report.p50_ms,
            "p99_ms": report.p99_ms,
            "objective_ms": OBJECTIVE // timedelta(milliseconds=1),
            "within_objective_permille": report.within_objective_permille,
            "verifiers": verifiers,
            "verifiers_left_out": len(report.verifiers) - len(verifiers),
        },
    }


def _verifiers(report: PropagationReport) -> list[Mapping[str, Any]]:
    room = MOST_VERIFIER_OCTETS
    told: list[Mapping[str, Any]] = []
    for standing in report.verifiers:
        verifier = standing.verifier
        room -= _VERIFIER_OCTETS + len(verifier.name) + len(verifier.node_id)
        if room < 0:
            break
        told.append(_standing(standing))
    return told


def _standing(standing: VerifierStanding) -> Mapping[str, Any]:
    verifier = standing.verifier
    node = {"node_id": verifier.node_id} if verifier.node_id else {}
    return {
        "name": verifier.label,
        "kind": verifier.kind.value,
        **node,
        "state": standing.state.value,
        "acknowledged_at": _time(standing.acknowledged_at),
        "latency_ms": standing.latency_ms,
    }


def _held(repos: Repositories, order: RevocationOrder) -> tuple[str, ...]:
    return repos.holds.held_entry_ids(order.hold, MOST_IDS) if order.hold else ()


def _time(at: datetime | None) -> str | None:
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z") if at else None
