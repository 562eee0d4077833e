"""Token buckets, one for each caller and method, and places for streams; in bounded memory.

- Identities and anonymous addresses are kept apart, so that strangers cannot push a node's
  bucket out of memory.
- A stream costs for as long as it is open: strangers may hold a bounded number of them.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from identity_broker.domain.buckets import DEFAULT_CAPACITY, Buckets
from identity_broker.domain.caller import Caller
from identity_broker.errors import RateLimited
from identity_broker.server.rpc.methods import Rate, RateName

ANONYMOUS_STREAMS: Final = 16  # of one network
ANONYMOUS_STREAMS_TOGETHER: Final = 1000
_STREAM_RETRY_SECONDS: Final = 10.0


class RateLimiter:
    """Says whether a caller may call a method now, and whether a stranger may hold a stream.

    Args:
        rates: a rate for each name; a name without one is not limited.
        monotonic: seconds that only grow.
        capacity: most buckets kept, of identities and of addresses each.
        anonymous_streams: most streams open at a time without an identity, of one network.
        anonymous_streams_together: and of all networks.
    """

    def __init__(
        self,
        rates: Mapping[RateName, Rate],
        *,
        monotonic: Callable[[], float] = time.monotonic,
        capacity: int = DEFAULT_CAPACITY,
        anonymous_streams: int = ANONYMOUS_STREAMS,
        anonymous_streams_together: int = ANONYMOUS_STREAMS_TOGETHER,
    ) -> None:
        self._rates = {
            name: (1.0 / rate.per_second, rate.burst / rate.per_second)
            for name, rate in rates.items()
        }
        self._monotonic = monotonic
        self._identities: Buckets[tuple[str, str]] = Buckets(capacity)
        self._addresses: Buckets[tuple[str, str]] = Buckets(capacity)
        self._anonymous_streams = anonymous_streams
        self._anonymous_streams_together = anonymous_streams_together
        self._streams: Counter[str] = Counter()

    def charge(self, caller: Caller, peer: str, method: str, rate: RateName, cost: int = 1) -> None:
        """Take `cost` tokens from the caller's bucket for the method.

        A caller without an identity is known by its network address `peer`, as gRPC names it.

        Raises:
            RateLimited: the bucket holds fewer; `retry_after` says when it will hold enough.
        """
        numbers = self._rates.get(rate)
        if numbers is None:
            return
        interval, depth = numbers
        if caller.is_anonymous:
            buckets, key = self._addresses, (network_of(peer), method)
        else:
            buckets, key = self._identities, (caller.name, method)
        wait = buckets.take(key, cost * interval, depth, self._monotonic())
        if wait:
            # One decimal, rounded up: an exact figure would only invite a stampede.
            raise RateLimited(retry_after=math.ceil(round(wait * 10, 6)) / 10)

    @contextmanager
    def stream(self, caller: Caller, peer: str) -> Iterator[None]:
        """Hold a stream open for as long as the block runs; identities are not counted.

        Raises:
            RateLimited: the caller has no identity, and its network, or all strangers together,
                hold as many as they may.
        """
        if not caller.is_anonymous:
            yield
            return
        network = network_of(peer)
        if (
            self._streams[network] >= self._anonymous_streams
            or self._streams.total() >= self._anonymous_streams_together
        ):
            raise RateLimited(
                "too many streams are open to callers without an identity",
                hint="close one, or call with an X.509-SVID on the mTLS listener",
                retry_after=_STREAM_RETRY_SECONDS,
            )
        self._streams[network] += 1
        try:
            yield
        finally:
            self._streams[network] -= 1
            if not self._streams[network]:
                del self._streams[network]

    def __len__(self) -> int:
        return len(self._identities) + len(self._addresses)


def network_of(peer: str) -> str:
    """The address in gRPC's peer name; of IPv6 the /64, since one host owns all of it."""
    kind, _, rest = peer.partition(":")
    if kind == "ipv4":
        return rest.rpartition(":")[0]
    if kind == "ipv6":
        text = rest.replace("%5B", "[").replace("%5D", "]").rpartition(":")[0].strip("[]")
        try:
            address = ipaddress.IPv6Address(text.partition("%")[0])
        except ValueError:
            return rest
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    return peer
