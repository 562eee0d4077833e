"""The process at the other end of a connection to the agent, for as long as the connection lives.

- A process that became another program, or another user, loses its connection: whatever it had
  asked for was asked by somebody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from identity_broker.errors import ProcessChanged
from identity_broker.localpeer.process import LiveProcess

# Long enough for the refusal itself to arrive.
_LAST_WORD_SECONDS: Final = 0.2


class ConnectedCaller:
    """Implements `agent.identity.Caller`.

    Args:
        process: who connected; the listener's to close.
        drop: ends the connection.
    """

    __slots__ = ("_drop", "process")

    def __init__(self, process: LiveProcess, drop: Callable[[], object]) -> None:
        self.process: Final = process
        self._drop = drop

    def __repr__(self) -> str:
        return f"ConnectedCaller({self.process!r})"

    @property
    def uid(self) -> int:
        """See `Caller.uid`."""
        return self.process.uid

    def check(self) -> None:
        """See `Caller.check`."""
        try:
            self.process.check()
        except ProcessChanged:
            asyncio.get_running_loop().call_later(_LAST_WORD_SECONDS, self._drop)
            raise

    async def ended(self) -> None:
        """See `Caller.ended`."""
        await self.process.ended()
