"""Who follows revocations through this node, told to the broker: on every stream, at every change.

- A report is the whole list. Changes are gathered for a moment, and what the broker knows already
  is not sent again.
- It holds at most what a broker takes; the rest is left out, and said so once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from identity_client.node.values import Verifier

__all__ = ["GATHER_SECONDS", "MOST_VERIFIERS", "Reports"]

_logger = logging.getLogger(__name__)

MOST_VERIFIERS: Final = 1000
"""How many a report may name (node_sync.proto)."""
GATHER_SECONDS: Final = 0.05
"""How long changes are gathered."""


class _Stream(Protocol):
    """What a report is sent on: `link.SyncCall`."""

    async def report(self, verifiers: Iterable[Verifier]) -> None: ...


class Reports:
    """The reports of one node. Belongs to one event loop."""

    def __init__(self) -> None:
        self._verifiers: Callable[[], Sequence[Verifier]] | None = None
        self._changed = asyncio.Event()
        self._said_too_many = False

    def change(self, verifiers: Callable[[], Sequence[Verifier]]) -> None:
        """There is something new to tell; `verifiers` is called when it is told."""
        self._verifiers = verifiers
        self._changed.set()

    async def run(self, stream: _Stream) -> None:
        """Tell it all on a stream that has just begun, then what changes, until cancelled."""
        if self._verifiers is not None:
            self._changed.set()
        told: list[Verifier] = []
        while True:
            await self._changed.wait()
            await asyncio.sleep(GATHER_SECONDS)
            self._changed.clear()
            now = self._now()
            if now != told:
                told = now
                await stream.report(now)

    def _now(self) -> list[Verifier]:
        if self._verifiers is None:
            return []
        verifiers = self._verifiers()
        if len(verifiers) > MOST_VERIFIERS and not self._said_too_many:
            self._said_too_many = True
            _logger.warning(
                "%d verifiers follow revocations here; the broker is told of the first %d alone",
                len(verifiers),
                MOST_VERIFIERS,
            )
        return list(verifiers[:MOST_VERIFIERS])
