"""The deny set: what it denies, what it forgets, what silence means."""

from __future__ import annotations

import gc
import logging
import math
import time
import weakref
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from identity_client.clock import utc_now
from identity_client.errors import PeerRejected, RevocationsStale, SettingsInvalid
from identity_client.naming import parse_spiffe_id
from identity_client.peer import Peer, check_current, is_refused
from identity_client.revocation import (
    DenySet,
    IdentityEpoch,
    Issuer,
    RevocationList,
    RevokedCredential,
    id_key,
)
from identity_client.staleness import DEFAULT_STALENESS, StalenessPolicy, uptime

START = datetime(2026, 1, 1, tzinfo=UTC)
SERIAL = "01" * 20
WEB = "spiffe://example.org/web"
ISSUER = Issuer(b"name", bytes.fromhex("aabb"))


def revoked(
    credential: str = SERIAL, *, life: float = 600, now: datetime = START, tls: bool = True
) -> RevokedCredential:
    return RevokedCredential(credential, WEB, now + timedelta(seconds=life), tls)


def test_a_serial_is_denied_whatever_its_padding() -> None:
    denied = DenySet()
    denied.add([revoked("00000abc")], now=START)
    assert denied.denies("0abc", None)
    assert denied.denies("00000ABC", None)
    assert not denied.denies("0abcd0", None)
    assert not denied.denies("", None)


def test_ids_that_are_no_numbers_are_told_apart() -> None:
    texts = ["0a", "0a ", " 0a", "a", "a-b", "ä", "61", "0a0b", "0a 0b", ""]
    assert len({id_key(one) for one in texts}) == len(texts)


def test_expired_denials_leave_and_unexpired_ones_do_not() -> None:
    denied = DenySet()
    for number in range(100):
        denied.add([revoked(f"{number:040x}", life=number + 1)], now=START)
    assert len(denied) == 100
    later = START + timedelta(seconds=61)
    denied.prune(now=later)
    assert {f"{n:040x}" in denied for n in range(60)} == {False}
    assert {f"{n:040x}" in denied for n in range(61, 100)} == {True}
    denied.prune(now=later + timedelta(hours=1))
    assert len(denied) == 0


def test_what_has_expired_is_not_taken_at_all() -> None:
    denied = DenySet()
    assert denied.add([revoked(life=0)], now=START) == ()
    assert denied.add([revoked(life=1)], now=START) != ()
    assert denied.add([revoked(life=1)], now=START) == ()


def test_a_shorter_life_takes_nothing_back() -> None:
    denied = DenySet()
    denied.add([revoked(life=3600)], now=START)
    denied.add([revoked(life=1)], now=START)
    denied.prune(now=START + timedelta(minutes=30))
    assert denied.denies(SERIAL, None)


def test_a_time_that_is_absurd_is_one_that_comes() -> None:
    denied = DenySet()
    denied.add([RevokedCredential(SERIAL, WEB, datetime.max.replace(tzinfo=UTC))], now=START)
    assert denied.denies(SERIAL, None)
    denied.prune(now=START + timedelta(days=11 * 366))
    assert len(denied) == 0


def test_a_full_state_takes_back_only_when_complete() -> None:
    denied = DenySet()
    denied.add([revoked("aa"), revoked("bb")], now=START)
    denied.begin_full()
    denied.add([revoked("cc")], now=START)
    assert all(one in denied for one in ("aa", "bb", "cc"))
    denied.abandon_full()
    assert all(one in denied for one in ("aa", "bb", "cc"))
    denied.begin_full()
    denied.add([revoked("bb")], now=START)
    denied.finish_full()
    assert [one in denied for one in ("aa", "bb", "cc")] == [False, True, False]


def test_a_released_credential_is_denied_no_more() -> None:
    denied = DenySet()
    denied.add([revoked("aa"), revoked("bb")], now=START)
    assert denied.release(["aa", "unknown"])
    assert not denied.release(["unknown"])
    assert ("aa" in denied, "bb" in denied) == (False, True)


def test_lists_and_feed_do_not_touch_each_other() -> None:
    denied = DenySet()
    denied.add([revoked("aa")], now=START)
    denied.replace_lists([RevocationList.of(ISSUER, ["bb"])], now=START)
    denied.begin_full()
    denied.finish_full()
    assert denied.denies("bb", ISSUER)
    denied.add([revoked("aa")], now=START)
    denied.replace_lists([], now=START)
    assert denied.denies("aa", ISSUER)
    assert not denied.denies("bb", ISSUER)


def test_an_authority_takes_its_certificates_and_tokens_with_it() -> None:
    denied = DenySet()
    assert denied.deny_authorities(["aabb", "jwt-key-1"])
    assert not denied.deny_authorities(["aabb", "jwt-key-1"])
    assert denied.denies("02", ISSUER)
    assert not denied.denies("02", Issuer(b"name", b"other"))
    assert not denied.denies("02", Issuer(b"name", b""))
    assert denied.denies_token("j", WEB, 1.0, "jwt-key-1")
    assert not denied.denies_token("j", WEB, 1.0, "jwt-key-2")
    denied.deny_authorities([])
    assert not denied.denies("02", ISSUER)


def test_an_epoch_refuses_what_is_older_and_is_never_lowered() -> None:
    now = int(utc_now().timestamp())
    denied = DenySet()
    assert denied.raise_epoch(IdentityEpoch(WEB, now, now + 600))
    assert not denied.raise_epoch(IdentityEpoch(WEB, now - 100, now + 60))
    assert denied.denies_token("", WEB, now)
    assert denied.denies_token("", WEB, now - 1)
    assert denied.denies_token("", WEB, None)
    assert not denied.denies_token("", WEB, now + 1)
    assert not denied.denies_token("", f"{WEB}2", now)
    assert not denied.raise_epoch(IdentityEpoch("spiffe://a/b", now, now - 1))
    assert not denied.denies_token("", "spiffe://a/b", now)


def test_an_identity_is_named_by_its_certificates_alone() -> None:
    now = utc_now()
    denied = DenySet()
    denied.add([revoked("jti", now=now, tls=False)], now=now)
    assert not denied.names(WEB)
    denied.add([revoked(now=now)], now=now)
    assert denied.names(WEB)
    assert not denied.names(f"{WEB}2")


def test_what_was_kept_is_denied_again() -> None:
    now = utc_now()
    denied, again = DenySet(), DenySet()
    denied.add([revoked(now=now), revoked("a-b", now=now, tls=False)], now=now)
    denied.raise_epoch(IdentityEpoch(WEB, 5, int(now.timestamp()) + 60))
    denied.deny_authorities(["aabb"])
    denied.hear(now=now - timedelta(seconds=300), ago=300)
    again.restore(denied.keep(), now=now)
    assert SERIAL in again
    assert "a-b" in again
    assert again.names(WEB)
    assert again.denies_token("", WEB, 5)
    assert again.denies("02", ISSUER)
    assert 299 < again.age < 302
    late = DenySet()
    late.restore(denied.keep(), now=now + timedelta(hours=1))
    assert SERIAL not in late


# --- who is told ---------------------------------------------------------------------------------


class Listener:
    def __init__(self, error: Exception | None = None) -> None:
        self.told = 0
        self.error = error

    def peers_denied(self) -> None:
        self.told += 1
        if self.error is not None:
            raise self.error


def test_watchers_are_told_and_held_weakly() -> None:
    denied = DenySet()
    listener, gone = Listener(), Listener()
    denied.watch(listener)
    denied.watch(gone)
    watched = weakref.ref(gone)
    del gone
    gc.collect()
    assert watched() is None
    denied.tell_watchers()
    assert listener.told == 1


def test_one_watcher_that_fails_keeps_nothing_from_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    denied = DenySet()
    listeners = [Listener(ValueError("a bug")) for _ in range(2)]
    for one in listeners:
        denied.watch(one)
    denied.tell_watchers()
    assert [one.told for one in listeners] == [1, 1]
    assert "a bug" in caplog.text


# --- silence -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("warn:60s", StalenessPolicy.warn(60)),
        ("refuse:5m", StalenessPolicy.refuse(timedelta(minutes=5))),
        ("refuse:90", StalenessPolicy.refuse(90)),
        ("warn:1d", StalenessPolicy.warn(86_400)),
    ],
)
def test_a_policy_is_read(text: str, expected: StalenessPolicy) -> None:
    assert StalenessPolicy.parse(text) == expected
    assert StalenessPolicy.parse(str(expected)) == expected


@pytest.mark.parametrize("text", ["", "warn", "refuse:", "refuse:0", "refuse:-1", "drop:1s", "5m"])
def test_a_policy_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SettingsInvalid):
        StalenessPolicy.parse(text)


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_a_policy_needs_a_time(seconds: float) -> None:
    with pytest.raises(SettingsInvalid):
        StalenessPolicy.refuse(seconds)


def test_silence_is_refused_after_its_time() -> None:
    denied = DenySet(StalenessPolicy.refuse(60))
    denied.check_fresh()
    denied.hear(now=utc_now(), ago=59)
    denied.check_fresh()
    denied.hear(now=utc_now(), ago=61)
    assert denied.is_stale()
    with pytest.raises(RevocationsStale) as refused:
        denied.check_fresh()
    assert refused.value.reason == "REVOCATIONS_STALE"
    assert "source.status()" in refused.value.hint
    denied.check_fresh(StalenessPolicy.refuse(600))
    with pytest.raises(RevocationsStale):
        denied.check_fresh(StalenessPolicy.refuse(61))
    denied.hear(now=utc_now())
    denied.check_fresh()


def test_silence_is_warned_of_once_each_time(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    denied = DenySet()
    assert denied.staleness is DEFAULT_STALENESS
    denied.hear(now=utc_now(), ago=61)
    for _ in range(5):
        denied.check_fresh()
        denied.note_silence()
    assert caplog.text.count("nothing was heard about revocations") == 1
    denied.hear(now=utc_now(), ago=62)
    denied.check_fresh()
    assert caplog.text.count("nothing was heard about revocations") == 2


def test_a_list_is_news_until_its_issuer_promised_the_next() -> None:
    denied = DenySet(StalenessPolicy.refuse(1))
    now = utc_now()
    denied.lack_feed(now=now)
    denied.replace_lists([RevocationList.of(ISSUER, [], now.timestamp() + 60)], now=now)
    denied._heard -= 100
    denied.check_fresh()
    assert denied.age == 0
    denied.replace_lists([RevocationList.of(ISSUER, [], now.timestamp() - 1)], now=now)
    denied._heard -= 100
    with pytest.raises(RevocationsStale):
        denied.check_fresh()
    # A list that does not come any more is old from then on.
    denied.replace_lists([RevocationList.of(ISSUER, [], now.timestamp() + 60)], now=now)
    denied._heard -= 100
    denied.lose_lists()
    denied.check_fresh()
    denied._heard -= 2
    with pytest.raises(RevocationsStale):
        denied.check_fresh()


def test_where_there_is_a_feed_lists_are_no_news() -> None:
    """An agent whose broker is gone still sends the lists it has."""
    now = utc_now()
    lists = [RevocationList.of(ISSUER, ["bb"], now.timestamp() + 3600)]
    denied = DenySet(StalenessPolicy.refuse(2))
    denied.find_feed()
    denied.hear(now=now, ago=3)
    denied.replace_lists(lists, now=now)
    assert denied.denies("bb", ISSUER)
    assert not denied.synced
    with pytest.raises(RevocationsStale):
        denied.check_fresh()
    # Nor does it help to say later that there is none.
    denied.lack_feed(now=now)
    denied.replace_lists(lists, now=now)
    denied.lose_lists()
    assert denied.is_stale()
    denied.hear(now=now)
    denied.check_fresh()


def test_until_it_is_known_whether_there_is_a_feed_silence_counts() -> None:
    now = utc_now()
    denied = DenySet(StalenessPolicy.refuse(2))
    denied._heard -= 3
    denied.replace_lists([RevocationList.of(ISSUER, [], now.timestamp() + 3600)], now=now)
    assert denied.is_stale()
    denied.lack_feed(now=now)
    assert denied.synced
    assert denied.age == 0


def test_a_clock_that_is_set_back_makes_no_list_last_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = utc_now()
    denied = DenySet(StalenessPolicy.refuse(2))
    denied.lack_feed(now=now)
    denied.replace_lists([RevocationList.of(ISSUER, [], now.timestamp() + 60)], now=now)
    assert denied.age == 0
    later, before = uptime() + 61, time.time() - 3600
    monkeypatch.setattr("identity_client.revocation.uptime", lambda: later)
    monkeypatch.setattr("time.time", lambda: before)
    assert denied.is_stale()


# --- who cannot be told apart --------------------------------------------------------------------


def test_while_an_authority_is_denied_nobody_is_accepted_that_names_no_key() -> None:
    peer = Peer(parse_spiffe_id(WEB), WEB, "example.org", "02", math.inf, Issuer(b"name", b""))
    denied = DenySet()
    check_current(peer, denied)
    denied.deny_authorities(["jwt-key-1"])
    check_current(peer, denied)
    denied.deny_authorities(["ccdd"])
    for one in (peer, replace(peer, issuer=None)):
        with pytest.raises(PeerRejected) as refused:
            check_current(one, denied)
        assert refused.value.reason == "PEER_REJECTED"
        assert is_refused(one, denied)
    check_current(replace(peer, issuer=ISSUER), denied)
    denied.deny_authorities([])
    check_current(peer, denied)


def test_whom_what_is_denied_may_concern() -> None:
    now = utc_now()
    denied = DenySet()
    denied.replace_lists([RevocationList.of(ISSUER, [])], now=now)
    assert not denied.may_concern(WEB)
    denied.replace_lists([RevocationList.of(ISSUER, ["bb"])], now=now)
    assert denied.may_concern(WEB)
    denied.find_feed()
    assert not denied.may_concern(WEB)  # The feed would have named it.
    denied.add([revoked(now=now)], now=now)
    assert denied.may_concern(WEB)
    assert not denied.may_concern(f"{WEB}2")
    denied.deny_authorities(["aabb"])
    assert denied.may_concern(f"{WEB}2")


def test_a_name_goes_with_the_last_that_has_it() -> None:
    now = utc_now()
    denied = DenySet()
    denied.add([revoked("aa", now=now), revoked("bb", now=now)], now=now)
    denied.add([revoked("aa", now=now), revoked("cc", now=now, tls=False)], now=now)
    denied.release(["aa"])
    assert denied.names(WEB)
    again = DenySet()
    again.restore(denied.keep(), now=now)
    for one in (denied, again):
        one.release(["bb", "bb", "aa"])
        assert not one.names(WEB)
        assert "cc" in one
        assert not one.keep().whose
    denied.add([revoked("aa", now=now)], now=now)
    assert denied.names(WEB)
    denied.prune(now=now + timedelta(hours=1))
    assert not denied.keep().whose
