"""What one authority has revoked, as the bytes that stand in its lists.

- An entry is encoded once. Its own bytes are the index too: beside them there are eight bytes for
  each, and no object.
- Entries lie in many small buckets by serial number. Adding one copies a bucket, so its cost does
  not grow with the list; what was handed out to be signed is never changed.
- A part of the list (`Shard`) is some of the buckets. For a number of parts that is not the one
  configured it may be more than was asked for, never less.
- Changes are remembered for a while: they are what a delta says.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterable
from datetime import datetime

from identity_broker.domain.credential import Revocation
from identity_ca.crl import RevokedEntry, encode_entry, encode_removal
from identity_ca.der import encode_integer
from identity_ca.distribution import Shard

MOST_CHANGES = 8_192
"""Changes of this many entries fit into a delta."""
MOST_UNLISTED = 65_536
"""Changes remembered at most while no full list has them."""

_BUCKETS = 4_096


class _Bucket:
    """Some entries: `expiries` has, in their order, when each certificate ends (seconds)."""

    __slots__ = ("changed_at", "earliest", "encoded", "expiries")

    def __init__(self) -> None:
        self.encoded = b""
        self.expiries = array("q")
        self.earliest = 0
        self.changed_at = 0

    def find(self, serial: bytes) -> tuple[int, int] | None:
        """Where the entry begins, and how many stand before it; `serial` is its INTEGER, DER."""
        encoded = self.encoded
        begins = count = 0
        at = encoded.find(serial)
        while at >= 0:
            # The same bytes may stand inside of others: only an entry's own beginning counts.
            while begins < at - 2:
                begins += 2 + encoded[begins + 1]
                count += 1
            if begins == at - 2:
                return begins, count
            at = encoded.find(serial, at + 1)
        return None

    def entry(self, begins: int) -> bytes:
        """The entry that begins there."""
        return self.encoded[begins : begins + 2 + self.encoded[begins + 1]]

    def remove(self, begins: int, count: int) -> None:
        """Forget the entry that begins there, `count` entries standing before it."""
        ends = begins + 2 + self.encoded[begins + 1]
        self.encoded = self.encoded[:begins] + self.encoded[ends:]
        del self.expiries[count]
        self.earliest = min(self.expiries, default=0)

    def keep_after(self, now: float) -> int:
        """Forget what has expired; return how many that was."""
        kept: list[bytes] = []
        expiries = array("q")
        begins = 0
        for expiry in self.expiries:
            entry = self.entry(begins)
            begins += len(entry)
            if expiry > now:
                kept.append(entry)
                expiries.append(expiry)
        gone = len(self.expiries) - len(expiries)
        self.encoded, self.expiries = b"".join(kept), expiries
        self.earliest = min(expiries, default=0)
        return gone


class RevokedEntries:
    """The entries of one authority.

    Args:
        shards: into how many parts the lists are divided.

    Attributes:
        position: grows with every change that a new list is needed for.
    """

    def __init__(self, shards: int) -> None:
        self._modulus = shards * max(1, _BUCKETS // shards)
        self._buckets: dict[int, _Bucket] = {}
        self._count = 0
        self._changes: deque[tuple[int, int, bytes]] = deque()
        self._forgotten = 0
        self.position = 0

    def __len__(self) -> int:
        return self._count

    @property
    def octets(self) -> int:
        """Memory that the entries take, in bytes, about."""
        return sum(len(one.encoded) + 8 * len(one.expiries) for one in self._buckets.values())

    def put(self, revocations: Iterable[Revocation]) -> bool:
        """Let X.509-SVIDs stand in the lists from now on; return whether that is news.

        One that stands there for another reason or since another time is put anew.
        """
        found: dict[int, dict[int, tuple[bytes, int]]] = {}
        for one in revocations:
            serial = int(one.id, 16)
            entry = encode_entry(RevokedEntry(serial, one.revoked_at, int(one.reason)))
            bucket = found.setdefault(serial % self._modulus, {})
            bucket[serial] = (entry, math.ceil(one.expires_at.timestamp()))
        before = self.position
        for number, items in found.items():
            self._put_into(self._buckets.setdefault(number, _Bucket()), items)
        return self.position != before

    def _put_into(self, bucket: _Bucket, items: dict[int, tuple[bytes, int]]) -> None:
        fresh: list[bytes] = []
        for serial, (entry, expiry) in items.items():
            place = bucket.find(encode_integer(serial)) if bucket.encoded else None
            if place is not None:
                if bucket.entry(place[0]) == entry:
                    continue
                bucket.remove(*place)
                self._count -= 1
            fresh.append(entry)
            bucket.expiries.append(expiry)
            bucket.earliest = min(bucket.earliest or expiry, expiry)
            self._note(serial, entry)
        if fresh:
            # What stands last: a removal above does not move it.
            bucket.encoded += b"".join(fresh)
            bucket.changed_at = self.position
            self._count += len(fresh)

    def release(self, credential_id: str, now: datetime) -> bool:
        """Let an X.509-SVID stand in the lists no more; return whether it stood there."""
        try:
            serial = int(credential_id, 16)
        except ValueError:
            return False  # a jti of another layout than ours
        bucket = self._buckets.get(serial % self._modulus)
        place = None if bucket is None else bucket.find(encode_integer(serial))
        if bucket is None or place is None:
            return False
        bucket.remove(*place)
        self._count -= 1
        self._note(serial, encode_removal(serial, now))
        bucket.changed_at = self.position
        return True

    def expired(self, now: datetime) -> list[int]:
        """Names of the buckets that hold entries of certificates that have expired."""
        seconds = now.timestamp()
        return [name for name, one in self._buckets.items() if 0 < one.earliest <= seconds]

    def forget_expired(self, name: int, now: datetime) -> None:
        """Let what has expired leave a bucket. No new list is needed for that."""
        self._count -= self._buckets[name].keep_after(now.timestamp())

    # --- what stands in a list --------------------------------------------------------------------

    def full(self) -> list[bytes]:
        """Every entry."""
        return [one.encoded for one in self._buckets.values()]

    def part(self, shard: Shard) -> tuple[list[bytes], int]:
        """At least every entry of that part, and how many these are."""
        buckets = self._part(shard)
        return [one.encoded for one in buckets], sum(len(one.expiries) for one in buckets)

    def part_position(self, shard: Shard) -> int:
        """The position of that part's last change."""
        return max((one.changed_at for one in self._part(shard)), default=0)

    def _part(self, shard: Shard) -> list[_Bucket]:
        step = math.gcd(shard.of, self._modulus)
        names = range(shard.number % step, self._modulus, step)
        return [one for name in names if (one := self._buckets.get(name)) is not None]

    def knows_since(self, position: int) -> bool:
        """Whether every change after `position` is remembered."""
        return position >= self._forgotten

    def changes_since(self, position: int) -> list[bytes] | None:
        """The last of each entry's changes after `position`; None when they are not all known."""
        if not self.knows_since(position):
            return None
        latest: dict[int, bytes] = {}
        for at, serial, entry in reversed(self._changes):
            if at <= position:
                break
            latest.setdefault(serial, entry)
        return list(reversed(latest.values()))

    def listed(self, position: int) -> None:
        """A full list has everything up to `position`: forget changes that are too many."""
        while len(self._changes) > MOST_CHANGES and self._changes[0][0] <= position:
            self._forgotten = self._changes.popleft()[0]

    def forget_changes(self) -> None:
        """Begin a new history: no list has been made of what stands here."""
        self._changes.clear()
        self._forgotten = self.position

    def _note(self, serial: int, change: bytes) -> None:
        self.position += 1
        self._changes.append((self.position, serial, change))
        if len(self._changes) > MOST_UNLISTED:
            self._forgotten = self._changes.popleft()[0]
