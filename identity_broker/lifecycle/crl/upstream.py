"""Lists of the authorities above ours, for verifiers that check a whole chain.

- Signed or published by the upstream; asked for now and then, never on anybody's way.
- What the upstream had last stays until it expires; without it, our own lists are there all the
  same.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from identity_broker.domain.clock import Clock
from identity_broker.errors import BrokerError
from identity_broker.lifecycle.crl.document import ListDocument, ListKind
from identity_broker.lifecycle.crl.numbers import ListNumbers
from identity_broker.lifecycle.crl.press import BACKDATE
from identity_broker.signing import Signing
from identity_broker.signing.crl import lists_above
from identity_broker.telemetry.logs import get_logger

_log = get_logger("crl")

_ASK_AGAIN = timedelta(minutes=5)
_RETRY = timedelta(seconds=30)
# No authority's id: those are hexadecimal.
_NUMBERS_OF = "upstream"


class UpstreamLists:
    """Keeps them.

    Args:
        validity: of those that are signed when asked for.

    Attributes:
        current: those in force.
    """

    def __init__(
        self, signing: Signing, numbers: ListNumbers, clock: Clock, validity: timedelta
    ) -> None:
        self._signing = signing
        self._numbers = numbers
        self._clock = clock
        self._validity = validity
        self._asked_at: datetime | None = None
        self._again_after = timedelta(0)
        self._chains: frozenset[bytes] = frozenset()
        self.current: tuple[ListDocument, ...] = ()

    async def look(self) -> bool:
        """Ask when it is time to, or when an authority is new; return whether any list is."""
        now = self._clock.now()
        above = self._above()
        before = self.current
        if not above:
            self.current = ()
            return bool(before)
        if above != self._chains or not self._is_recent(now):
            self._asked_at, self._again_after, self._chains = now, _RETRY, above
            try:
                self.current = await self._ask(now)
                self._again_after = min(_ASK_AGAIN, self._validity / 4)
            except BrokerError as error:
                _log.warning(
                    "no revocation list from the upstream",
                    reason=error.reason,
                    detail=error.detail,
                )
        self.current = tuple(one for one in self.current if one.next_update > now)
        return [one.der for one in before] != [one.der for one in self.current]

    def _is_recent(self, now: datetime) -> bool:
        asked_at = self._asked_at
        # A clock that was set back does not make it recent.
        return asked_at is not None and asked_at <= now < asked_at + self._again_after

    def _above(self) -> frozenset[bytes]:
        """The certificates above our own."""
        return frozenset(
            der
            for authority in self._signing.authorities.x509_set
            if authority.chain[0] not in authority.roots
            for der in (*authority.chain[1:], *authority.roots)
        )

    async def _ask(self, now: datetime) -> tuple[ListDocument, ...]:
        lists = await lists_above(
            self._signing,
            number=await self._numbers.next(_NUMBERS_OF),
            this_update=now - BACKDATE,
            next_update=now + self._validity,
        )
        return tuple(
            ListDocument(
                authority_id=one.authority_id,
                kind=ListKind.FULL,
                der=one.der,
                number=one.number,
                built_at=min(now, one.this_update + BACKDATE),
                this_update=one.this_update,
                next_update=one.next_update,
                entries=one.entries,
                own=False,
            )
            for one in lists
        )
