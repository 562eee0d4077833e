"""Whom a socket lets in when many want to be: a fair share for everyone who is there.

    user (one uid, or a range of subordinate ones) ──▶ uid ──▶ its connections

- Below the limit everyone is let in, up to the limit of one uid.
- At the limit a newcomer takes the place of the newest connection of the user who holds most, as
  long as that one still holds as many as the newcomer then does. So whoever loses a place held
  more than the limit divided by the users who are there, and nobody gains by coming again.
- Subordinate uids (`/etc/subuid`: 65,536 for any user who likes) are one user together. Among
  themselves they share in the same way.
- The favoured uids get a place whoever holds how many, and no more than the limit of one uid.
- The newest goes, not the idle one: bytes do not tell. A watch says nothing for hours, and a flood
  may ping. What was there before the flood stays.
- A decision costs at most the number of different counts, which is below the square root of
  twice the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a connection is let in, and the name of the one that has to go for it."""

    admitted: bool
    dropped: str | None = None


@dataclass(frozen=True, slots=True)
class _Holder:
    key: int
    count: int


class _Tally:
    """How many each one holds, and who holds most."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._by_count: dict[int, dict[int, None]] = {}

    def of(self, key: int) -> int:
        return self._counts.get(key, 0)

    def __len__(self) -> int:
        return len(self._counts)

    def change(self, key: int, by: int) -> None:
        before = self._counts.pop(key, 0)
        if before:
            alike = self._by_count[before]
            del alike[key]
            if not alike:
                del self._by_count[before]
        count = before + by
        if count:
            self._counts[key] = count
            self._by_count.setdefault(count, {})[key] = None

    def heaviest(self, *, beside: int | None = None) -> _Holder | None:
        """Whoever holds most, of several the one who came to it last; None: there is nobody."""
        for count in sorted(self._by_count, reverse=True):
            for key in reversed(self._by_count[count]):
                if key != beside:  # the only one passed over, so this is the second at most
                    return _Holder(key, count)
        return None


class Admission:
    """Keeps the places of one socket.

    Args:
        limit: places.
        limit_per_uid: most of one uid.
        user_of: the user behind a uid, as a number that is the same for all of that user's.
        favoured: uids that always get in.
    """

    def __init__(
        self,
        limit: int,
        limit_per_uid: int,
        *,
        user_of: Callable[[int], int] = lambda uid: uid,
        favoured: frozenset[int] = frozenset(),
    ) -> None:
        self._limit = limit
        self._limit_per_uid = limit_per_uid
        self._user_of = user_of
        self._favoured = favoured
        self._places: dict[str, tuple[int, int]] = {}  # user and uid of every connection
        self._users = _Tally()
        self._uids: dict[int, _Tally] = {}  # of a user
        self._names: dict[tuple[int, int], dict[str, None]] = {}  # oldest first

    def admit(self, name: str, uid: int) -> Verdict:
        """Decide on a new connection; one that is let in keeps its place until it has `left`.

        The place of the one that is dropped for it is free at once.
        """
        user = self._user_of(uid)
        uids = self._uids.get(user)
        if uids is not None and uids.of(uid) >= self._limit_per_uid:
            return Verdict(admitted=False)
        dropped: str | None = None
        if len(self._places) >= self._limit:
            dropped = self._to_drop(user, uid)
            if dropped is None:
                return Verdict(admitted=False)
            self.left(dropped)
        self._places[name] = (user, uid)
        self._names.setdefault((user, uid), {})[name] = None
        self._users.change(user, 1)
        self._uids.setdefault(user, _Tally()).change(uid, 1)
        return Verdict(admitted=True, dropped=dropped)

    def left(self, name: str) -> None:
        """The connection has ended. Twice is harmless."""
        place = self._places.pop(name, None)
        if place is None:
            return
        user, uid = place
        names = self._names[place]
        del names[name]
        if not names:
            del self._names[place]
        self._users.change(user, -1)
        uids = self._uids[user]
        uids.change(uid, -1)
        if not len(uids):
            del self._uids[user]

    def _to_drop(self, user: int, uid: int) -> str | None:
        if uid in self._favoured:
            other = self._users.heaviest(beside=user)
            return None if other is None else self._newest_of(other.key)
        most = self._users.heaviest()
        if most is not None and most.key != user and most.count >= self._users.of(user) + 2:
            return self._newest_of(most.key)
        uids = self._uids.get(user)
        within = None if uids is None else uids.heaviest()
        if uids is None or within is None or within.count < uids.of(uid) + 2:
            return None
        return self._newest(user, within.key)

    def _newest_of(self, user: int) -> str | None:
        most = self._uids[user].heaviest()
        return None if most is None else self._newest(user, most.key)

    def _newest(self, user: int, uid: int) -> str:
        return next(reversed(self._names[user, uid]))
