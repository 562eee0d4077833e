"""Token buckets: one for each caller and method, in bounded memory.

- A bucket is one number, the moment at which it is full again (GCRA); a full one is forgotten.
- Identities and anonymous addresses are kept apart, so that strangers cannot push a node's
  bucket out of memory.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Final

from identity_broker.domain.caller import Caller
from identity_broker.errors import RateLimited
from identity_broker.server.rpc.methods import Rate, RateName

DEFAULT_CAPACITY: Final = 65_536


class RateLimiter:
    """Says whether a caller may call a method now.

    Args:
        rates: a rate for each name; a name without one is not limited.
        monotonic: seconds that only grow.
        capacity: most buckets kept, of identities and of addresses each.
    """

    def __init__(
        self,
        rates: Mapping[RateName, Rate],
        *,
        monotonic: Callable[[], float] = time.monotonic,
        capacity: int = DEFAULT_CAPACITY,
    ) -> None:
        self._rates = {
            name: (1.0 / rate.per_second, rate.burst / rate.per_second)
            for name, rate in rates.items()
        }
        self._monotonic = monotonic
        self._capacity = capacity
        self._identities: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._addresses: OrderedDict[tuple[str, str], float] = OrderedDict()

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
        if caller.spiffe_id is not None or caller.local is not None:
            buckets, key = self._identities, (caller.name, method)
        else:
            buckets, key = self._addresses, (network_of(peer), method)
        now = self._monotonic()
        full_at = max(buckets.get(key, now), now) + cost * interval
        wait = full_at - now - depth
        if wait > 1e-9:
            # One decimal, rounded up: an exact figure would only invite a stampede.
            raise RateLimited(retry_after=math.ceil(round(wait * 10, 6)) / 10)
        buckets[key] = full_at
        buckets.move_to_end(key)
        if len(buckets) > self._capacity:
            buckets.popitem(last=False)

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
