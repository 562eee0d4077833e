"""Whatever is typed or read, `idb` answers in words: no command line and no file is a bug."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from identity_broker.cli.main import cli, run

# Not those that start processes or wait for signals.
NOUNS = sorted(set(cli.lazy) - {"dev", "demo", "server", "completion"})
OPTIONS = st.sampled_from(
    ["-o", "json", "table", "--help", "--file", "--ttl", "5m", "--node", "--spiffe-id", "/a", "--"]
)
WORDS = st.one_of(
    st.sampled_from(NOUNS),
    st.sampled_from(["list", "show", "create", "update", "delete", "check", "verify"]),
    st.sampled_from(["status", "lift", "--serial", "--select", "--plan", "--hold-until", "--yes"]),
    OPTIONS,
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8),
)
NEVER_A_BUG = {0, 2, 3, 4, 5, 6}

in_words = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def told(arguments: list[str]) -> tuple[int, str]:
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        return run(arguments), err.getvalue()


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IDB_DIR", str(tmp_path / "none"))
    monkeypatch.delenv("IDB_ADMIN_SOCKET", raising=False)


@in_words
@given(st.lists(WORDS, max_size=6))
def test_any_command_line(arguments: list[str]) -> None:
    code, err = told([word for word in arguments if word != "-"])
    assert code in NEVER_A_BUG
    if code:
        assert err
        assert "Traceback" not in err


@in_words
@given(st.binary(max_size=200))
def test_any_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    for arguments in (
        ["svid", "show", str(file)],
        ["svid", "verify", str(file), "--bundle", str(file), "--audience", "a"],
        ["revoke", "verify", str(file), "--bundle", str(file)],
        ["revoke", "verify", str(file), "--bundle", str(file), "--trust-domain", "example.org"],
        ["compromised", "--key", str(file), "--plan"],
        ["config", "check", "--config", str(file)],
    ):
        code, err = told(arguments)
        assert code in {2, 3} or (code == 0 and not content.strip())
        assert "Traceback" not in err


@in_words
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["entries", "id", "selectors", "x509_ttl_seconds", "expires_at"]),
                inner,
            )
        ),
        max_leaves=8,
    )
)
def test_any_json_as_entries(tmp_path: Path, document: object) -> None:
    import json

    from identity_broker.cli.entry_document import read_entries
    from identity_broker.cli.errors import FileMalformed

    file = tmp_path / "entries.json"
    file.write_text(json.dumps(document))
    try:
        entries = read_entries(file)
    except FileMalformed:
        return
    assert entries
