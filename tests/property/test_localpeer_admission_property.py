"""Who gets a place at a full socket: checked against a plain count of who holds what."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from identity_broker.localpeer.admission import Admission

RANGE = 100  # uids from here on are one user's
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["come", "come", "come", "come", "go"]),
        st.sampled_from([0, 1, 1, 1, 2, 2, 3, 4, 100, 101, 101, 102]),
        st.integers(0, 1 << 30),
    ),
    max_size=200,
)


def user_of(uid: int) -> int:
    return min(uid, RANGE)


class Door:
    """An `Admission`, and who is really there."""

    def __init__(self, limit: int, per_uid: int) -> None:
        self.limit = limit
        self.per_uid = per_uid
        self.admission = Admission(limit, per_uid, user_of=user_of, favoured=frozenset({0}))
        self.there: dict[str, int] = {}
        self.serial = 0

    def uids(self) -> Counter[int]:
        return Counter(self.there.values())

    def users(self) -> Counter[int]:
        return Counter(map(user_of, self.there.values()))

    def come(self, uid: int) -> tuple[bool, int | None]:
        """Whether it was let in, and the uid that made room."""
        self.serial += 1
        name = str(self.serial)
        verdict = self.admission.admit(name, uid)
        loser = None
        if verdict.dropped is not None:
            loser = self.there.pop(verdict.dropped)
        if verdict.admitted:
            self.there[name] = uid
        return verdict.admitted, loser

    def go(self, which: int) -> None:
        if self.there:
            name = list(self.there)[which % len(self.there)]
            del self.there[name]
            self.admission.left(name)
            self.admission.left(name)


@given(limit=st.integers(1, 24), per_uid=st.integers(1, 24), steps=STEPS)
def test_the_rule_of_admission(limit: int, per_uid: int, steps: list[tuple[str, int, int]]) -> None:
    door = Door(limit, per_uid)
    for what, uid, which in steps:
        if what == "go":
            door.go(which)
            continue
        uids, users, held = door.uids(), door.users(), len(door.there)
        user = user_of(uid)
        admitted, loser = door.come(uid)
        assert len(door.there) <= limit
        assert max(door.uids().values()) <= per_uid
        if uids[uid] >= per_uid:
            assert not admitted
        elif held < limit:
            assert admitted
            assert loser is None
        elif uid == 0:
            assert admitted == any(other != 0 for other in users)
        else:
            unfair = users.most_common(1)[0][1] >= users[user] + 2
            within = Counter({one: uids[one] for one in uids if user_of(one) == user})
            assert admitted == (unfair or (bool(within) and max(within.values()) >= uids[uid] + 2))
        if loser is None:
            assert len(door.there) == held + admitted
            continue
        assert admitted
        victim = user_of(loser)
        if uid == 0:
            assert victim != 0
        elif victim == user:
            assert uids[loser] >= uids[uid] + 2
        else:
            # Nobody loses what is within the fair share of the users that are there now.
            assert users[victim] == max(users.values()) > limit // len(users | Counter([user]))
            assert door.users()[victim] >= door.users()[user]
        # Within the user, again whoever holds most.
        assert uids[loser] == max(uids[one] for one in uids if user_of(one) == victim)


@given(floods=st.lists(st.integers(1, 60), min_size=1, max_size=6), comers=st.integers(1, 12))
def test_whoever_comes_new_gets_in_while_others_hold_more(floods: list[int], comers: int) -> None:
    door = Door(64, 64)
    for uid, flood in enumerate(floods, start=1):
        for _ in range(flood):
            door.come(uid)
    for comer in range(50, 50 + comers):
        before = door.users()
        full = len(door.there) == 64
        admitted, _ = door.come(comer)
        assert admitted == (not full or max(before.values()) > 1)
        assert admitted  # 18 users at most have 64 places


def test_a_range_of_uids_takes_no_more_than_one_user() -> None:
    door = Door(64, 32)
    for _ in range(16):
        assert door.come(1) == (True, None)
    for uid in range(RANGE, RANGE + 1000):  # one connection each
        door.come(uid)
    assert door.users() == {1: 16, RANGE: 48}
    for _ in range(16):  # and the user who is not alone any more grows to a half
        assert door.come(1)[0]
    assert door.users() == {1: 32, RANGE: 32}
    assert door.come(2) == (True, 1)
    assert door.come(2)[1] in range(RANGE, RANGE + 48)
    # Within the range everyone has one, so that nobody new gets one there.
    assert door.come(RANGE + 5000) == (False, None)


def test_the_newest_of_whoever_holds_most_goes() -> None:
    admission = Admission(4, 4)
    for name in ("watch", "later", "newest"):
        assert admission.admit(name, 1).admitted
    assert admission.admit("other", 2).admitted
    assert admission.admit("comer", 3).dropped == "newest"
    assert not admission.admit("again", 1).admitted
    assert not admission.admit("too", 3).admitted  # two each would be no fairer
    assert admission.admit("fourth", 4).dropped == "later"
    assert not admission.admit("fifth", 5).admitted  # one each
