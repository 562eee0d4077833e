"""How far back a position can be understood."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from identity_broker.domain.credential import CredentialKind, Revocation, RevocationReason
from identity_broker.domain.revocation import IdentityEpoch
from identity_broker.lifecycle.journal import Journal, Step
from identity_ca.spiffe_id import SpiffeId
from support.store import entry

NOW = datetime(2030, 1, 1, tzinfo=UTC)
MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)
API = SpiffeId.parse("spiffe://example.org/api")
FIRST, SECOND = entry("a", revision=1), entry("a", revision=2)


def revocation(credential_id: str) -> Revocation:
    """A credential that is on hold."""
    return Revocation(
        id=credential_id,
        kind=CredentialKind.X509,
        spiffe_id=API,
        revoked_at=NOW,
        expires_at=NOW + DAY,
        reason=RevocationReason.CERTIFICATE_HOLD,
    )


def test_the_oldest_picture_of_an_entry_counts() -> None:
    journal = Journal()
    journal.restart(10)
    journal.note(Step(11, {"a": None}))
    journal.note(Step(12, {"a": FIRST, "b": None}))
    journal.note(Step(15, {"a": SECOND}))
    assert journal.since(10).before == {"a": None, "b": None}
    assert journal.since(11).before == {"a": FIRST, "b": None}
    assert journal.since(12).before == {"a": SECOND}
    # Another broker may have told a node of the middle of a step: the whole of it comes again.
    assert journal.since(13).before == {"a": SECOND}
    assert journal.since(15).before == {}


def test_it_says_what_it_no_longer_reaches() -> None:
    journal = Journal(most=2)
    journal.restart(10)
    assert journal.reaches(10)
    assert not journal.reaches(9)
    journal.note(Step(11, {"a": None}))
    journal.note(Step(12, {}))  # concerns no entry
    journal.note(Step(13, {"b": None}))
    assert journal.reaches(10)
    journal.note(Step(14, {"c": None}))
    assert not journal.reaches(10)
    assert journal.reaches(11)
    assert journal.since(11).before == {"b": None, "c": None}


def test_a_step_larger_than_the_journal_leaves_nothing_to_resume_from() -> None:
    journal = Journal(most=2)
    journal.note(Step(5, {"a": None, "b": None, "c": None}))
    assert not journal.reaches(4)
    assert journal.reaches(5)


def test_a_restart_forgets() -> None:
    journal = Journal()
    journal.note(Step(5, {"a": None}))
    journal.restart(9)
    assert not journal.reaches(5)
    assert journal.since(9).before == {}


def test_what_was_released_is_revoked_no_more_and_the_other_way_round() -> None:
    journal = Journal()
    journal.restart(10)
    one, two = revocation("1"), revocation("2")
    journal.note(Step(11, revocations=[one, two]))
    journal.note(Step(12, released=["1"]))
    journal.note(Step(13, revocations=[one], released=["2"]))
    assert journal.since(10).revocations == (one,)
    assert journal.since(10).released == ("2",)
    assert journal.since(11).revocations == (one,)
    assert journal.since(11).released == ("2",)
    assert journal.since(12).released == ("2",)
    assert journal.since(13).revocations == ()
    assert journal.since(13).released == ()


def test_the_latest_epoch_of_an_identity_counts() -> None:
    journal = Journal()
    journal.restart(10)
    early, late = (IdentityEpoch(API, NOW + minute, NOW + DAY) for minute in (MINUTE, 2 * MINUTE))
    journal.note(Step(11, epochs=[early]))
    journal.note(Step(12, epochs=[late]))
    assert journal.since(10).epochs == (late,)
    assert journal.since(12).epochs == ()


def test_releases_and_epochs_count_among_what_is_kept() -> None:
    journal = Journal(most=2)
    journal.restart(10)
    journal.note(Step(11, released=["1"]))
    journal.note(Step(12, epochs=[IdentityEpoch(API, NOW, NOW + DAY)]))
    assert journal.reaches(10)
    journal.note(Step(13, released=["2"]))
    assert not journal.reaches(10)
    assert journal.reaches(11)
