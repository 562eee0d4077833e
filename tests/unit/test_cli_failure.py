"""Failures as they are told: one shape, one exit code for each sort, nothing secret."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from identity_broker import errors as broker_errors
from identity_broker.cli.exit_codes import BY_KIND, MEANINGS, ExitCode
from identity_broker.cli.failure import failure_of
from identity_broker.cli.main import run
from identity_ca import errors as ca_errors
from identity_client import errors as client_errors

ANSI = re.compile(r"\x1b\[")


def subclasses(
    cls: type[client_errors.IdentityError],
) -> Iterator[type[client_errors.IdentityError]]:
    for child in cls.__subclasses__():
        # Those of an integration are for callers of a library; whether they are loaded is chance.
        if ".integrations." not in child.__module__:
            yield child
        yield from subclasses(child)


def test_every_kind_has_an_exit_code_and_every_code_a_meaning() -> None:
    assert set(BY_KIND) == set(broker_errors.Kind)
    assert set(MEANINGS) == set(ExitCode)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (broker_errors.MalformedRequest(), 2),
        (broker_errors.ConfigError(), 2),
        (broker_errors.JoinTokenRejected(), 3),
        (broker_errors.NodeBanned(), 3),
        (broker_errors.EntryNotFound(), 4),
        (broker_errors.EntryExists(), 5),
        (broker_errors.StaleWrite(), 5),
        (broker_errors.RateLimited(), 6),
        (broker_errors.StoreUnavailable(), 6),
        (broker_errors.InvariantViolated(), 70),
        (client_errors.RequestRejected(), 2),
        (client_errors.NotAuthenticated(), 3),
        (client_errors.NotPermitted(), 3),
        (client_errors.PeerRevoked(), 3),
        (client_errors.ObjectNotFound(), 4),
        (client_errors.StaleObject(), 5),
        (client_errors.BrokerUnavailable(), 6),
        (client_errors.IdentityNotReady(), 6),
        (client_errors.BrokerFailed(), 70),
        (ca_errors.ChainRejected("no"), 3),
        (ca_errors.BackendUnavailable("no"), 6),
        (ca_errors.SpiffeIdError("no"), 2),
        (KeyError("x"), 70),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_exit_codes(error: Exception, code: int) -> None:
    assert failure_of(error).code == code


@pytest.mark.parametrize("cls", list(subclasses(client_errors.IdentityError)))
def test_no_refusal_of_the_sdk_is_taken_for_a_bug(cls: type[client_errors.IdentityError]) -> None:
    bugs = (client_errors.BrokerFailed, client_errors.ProtocolViolation)
    assert (failure_of(cls()).code == ExitCode.BUG) == issubclass(cls, bugs)


def test_text_of_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    error = client_errors.ObjectNotFound(
        "no registration entry has that id",
        reason="ENTRY_NOT_FOUND",
        hint="idb entry list",
        correlation_id="01J",
    )
    failure_of(error).tell(as_json=False)
    assert capsys.readouterr().err.splitlines() == [
        "error: no registration entry has that id",
        "hint: idb entry list",
        "reason: ENTRY_NOT_FOUND  id: 01J",
    ]


def test_what_the_other_side_wrote_cannot_steer_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    failure_of(client_errors.RequestRejected("a\x1b[2Jb\nc", hint="\x07")).tell(as_json=False)
    told = capsys.readouterr().err
    assert not ANSI.search(told)
    assert "a\\x1b[2Jb\\nc" in told


def test_a_bug_shows_its_type_and_not_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    failure = failure_of(ValueError("token=s3cr3t"))
    failure.tell(as_json=False)
    told = capsys.readouterr().err
    assert "ValueError" in told
    assert "this is a bug" in told
    assert "s3cr3t" not in told
    assert failure.id in told


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["entry", "no-such-verb"],
        ["entry", "show"],
        ["token", "generate", "--ttl", "soon"],
        ["credential", "list", "--limit", "0"],
        ["--no-such-option"],
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert "reason: USAGE" in told.err


def test_errors_are_json_when_json_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["entry", "no-such-verb", "-o", "json"]) == 2
    error = json.loads(capsys.readouterr().err)["error"]
    assert error["reason"] == "USAGE"
    assert error["exit_code"] == 2


def test_no_broker_named(
    tmp_path: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(str(tmp_path))
    for name in ("IDB_DIR", "IDB_ADMIN_SOCKET"):
        monkeypatch.delenv(name, raising=False)
    assert run(["entry", "list"]) == 2
    assert "reason: NO_BROKER_NAMED" in capsys.readouterr().err
