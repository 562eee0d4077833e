"""How far back a position can be understood."""

from __future__ import annotations

from identity_broker.lifecycle.journal import Journal, Step
from support.store import entry

FIRST, SECOND = entry("a", revision=1), entry("a", revision=2)


def test_the_oldest_picture_of_an_entry_counts() -> None:
    journal = Journal()
    journal.restart(10)
    journal.note(Step(11, {"a": None}, []))
    journal.note(Step(12, {"a": FIRST, "b": None}, []))
    journal.note(Step(15, {"a": SECOND}, []))
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
    journal.note(Step(11, {"a": None}, []))
    journal.note(Step(12, {}, []))  # concerns no entry
    journal.note(Step(13, {"b": None}, []))
    assert journal.reaches(10)
    journal.note(Step(14, {"c": None}, []))
    assert not journal.reaches(10)
    assert journal.reaches(11)
    assert journal.since(11).before == {"b": None, "c": None}


def test_a_step_larger_than_the_journal_leaves_nothing_to_resume_from() -> None:
    journal = Journal(most=2)
    journal.note(Step(5, {"a": None, "b": None, "c": None}, []))
    assert not journal.reaches(4)
    assert journal.reaches(5)


def test_a_restart_forgets() -> None:
    journal = Journal()
    journal.note(Step(5, {"a": None}, []))
    journal.restart(9)
    assert not journal.reaches(5)
    assert journal.since(9).before == {}
