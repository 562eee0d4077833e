"""One call, as the services see it.

- A service function takes the request and a `Call` and returns the response (unary), or is an
  async generator (streaming); it raises `BrokerError` to refuse. It never sees a gRPC context.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from identity_broker.domain.caller import Caller
from identity_broker.errors import BrokerError


@dataclass(frozen=True, slots=True)
class Call:
    """What the pipeline found out about a call before the service is reached.

    `stopping` is set when the server drains. Streams without a deadline are ended by the pipeline
    soon after; what waits for its caller to answer ends itself.

    `checks` is for a stream to add to: the pipeline calls them every second, also while the stream
    is stuck in sending, and ends it with what one of them raises. `endings` are told when it ends
    the stream for who the caller is by now.
    """

    method: str
    caller: Caller
    correlation_id: str
    stopping: asyncio.Event
    checks: list[Callable[[], object]] = field(default_factory=list)
    endings: list[Callable[[BrokerError], object]] = field(default_factory=list)
