"""Files on the command line: entries, secrets, SVIDs, configurations."""

from __future__ import annotations

import json
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from identity_broker.cli.entry_document import read_entries
from identity_broker.cli.errors import FileMalformed, FileUnusable
from identity_broker.cli.files import read_secret, write_secret
from identity_broker.cli.main import run
from identity_broker.cli.output import to_document
from identity_client.admin import Entry

ENTRY = Entry(
    id="e-1",
    spiffe_id="spiffe://example.org/a",
    parent_id="spiffe://example.org/idb/node/join_token/n",
    selectors=("unix:uid:1", "unix:gid:2"),
    x509_ttl=timedelta(minutes=5),
    dns_names=("a.example.org",),
    expires_at=datetime(2031, 1, 1, tzinfo=UTC),
    labels={"team": "a"},
    admin=True,
    per_process=True,
    key_algorithm="ec-p384",
)


@pytest.mark.parametrize("wrapped", [True, False])
def test_what_is_listed_can_be_created_again(tmp_path: Path, wrapped: bool) -> None:
    listed = [to_document(ENTRY)]
    file = tmp_path / "entries.json"
    file.write_text(json.dumps({"entries": listed} if wrapped else listed))
    assert read_entries(file) == [ENTRY]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", "3", "[[]]", '{"entries": {}}', "[" * 100_000, '["x"]', "\x00\xff"],
)
def test_what_is_no_list_of_entries(tmp_path: Path, content: str) -> None:
    file = tmp_path / "entries.json"
    file.write_text(content)
    with pytest.raises(FileMalformed):
        read_entries(file)


def test_every_problem_of_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "entries.json"
    file.write_text(
        json.dumps(
            [
                {"spiffe_id": 3, "selector": []},
                {"x509_ttl_seconds": -1, "admin": "yes", "labels": {"a": 1}, "expires_at": "soon"},
            ]
        )
    )
    with pytest.raises(FileMalformed) as caught:
        read_entries(file)
    problems = "\n".join(caught.value.fields["problems"])
    for part in (
        "entries[0].spiffe_id: must be a text",
        "entries[0]: 'selector' is not a key of an entry",
        "entries[1].x509_ttl_seconds: must be whole seconds",
        "entries[1].admin: must be true or false",
        "entries[1].labels: must be an object of texts",
        "entries[1].expires_at: must be a time",
    ):
        assert part in problems


def test_a_secret_is_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old")
    file.chmod(0o644)
    before = os.umask(0)
    try:
        write_secret(file, "idbt_x\n")
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_secret(file) == "idbt_x"
    assert list(tmp_path.iterdir()) == [file]


def test_a_secret_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileUnusable):
        write_secret(tmp_path / "missing" / "token", "x")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(FileUnusable):
        write_secret(folder, "x")
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("content", [b"", b"  \n", b"two words", b"\xff\xfe"])
def test_what_is_no_secret_is_not_shown(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(FileUnusable, match="does not hold one line of text") as caught:
        read_secret(file)
    assert "words" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"hello", "holds no certificate"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "holds no certificate"),
        (b"a.b.c", "looks like a JWT and is none"),
        (b"", "holds no certificate"),
    ],
)
def test_what_is_no_svid(
    tmp_path: Path, content: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "svid"
    file.write_bytes(content)
    assert run(["svid", "show", str(file)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert said in told.err
    assert "FILE_MALFORMED" in told.err


def test_unreadable_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["svid", "show", str(tmp_path / "none")],
        ["svid", "show", str(tmp_path)],
        ["svid", "verify", str(tmp_path / "none"), "--bundle", "x"],
    ):
        assert run(arguments) == 2
        assert "reason: FILE_UNREADABLE" in capsys.readouterr().err


def test_config_check_names_every_problem_and_no_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "broker.toml"
    file.write_text(
        '[server]\ntrust_domain = "example.org"\nadress = "s3cr3t-one"\n'
        '[openbao]\ntoken = "s3cr3t-two"\n[svid]\nx509_ttl = "s3cr3t-three"\n'
    )
    assert run(["config", "check", "--config", str(file)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "s3cr3t" not in told.err
    for key in ("server.adress", "openbao.token", "svid.x509_ttl"):
        assert key in told.err
    assert "reason: CONFIG_INVALID" in told.err
    assert run(["-o", "json", "config", "check", "--config", str(file)]) == 2
    problems = json.loads(capsys.readouterr().err)["error"]["problems"]
    assert len(problems) == 3


def test_config_show_masks_what_may_be_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "broker.toml"
    file.write_text(
        '[server]\ntrust_domain = "example.org"\n'
        '[store]\nurl = "postgresql://idb:s3cr3t@localhost/idb"\n'
    )
    assert run(["config", "show", "--config", str(file), "-o", "json"]) == 0
    told = capsys.readouterr()
    assert "s3cr3t" not in told.out + told.err
    assert json.loads(told.out)["server.trust_domain"] == "example.org"


def test_overrides_win_and_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    named = ["--set", "server.trust_domain=example.org"]
    assert run(["config", "show", *named, "--set", "svid.x509_ttl=5m", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["svid.x509_ttl"] == "5m"
    assert run(["config", "check", *named, "--set", "svid.x509_ttl=s3cr3t"]) == 2
    assert "s3cr3t" not in capsys.readouterr().err
    assert run(["config", "check", "--set", "no-equals"]) == 2
