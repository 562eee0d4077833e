from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr, ValidationError

from identity_broker.config.loading import known_keys
from identity_broker.config.reference import reference_markdown
from identity_broker.config.settings import Settings
from identity_broker.errors import ConfigError
from identity_ca.keys import KeyAlgorithm
from identity_ca.spiffe_id import TrustDomain

SECRET = "hvs.CAESIJsupersecretvalue0123456789"


def problems(
    text: str, tmp_path: Path, env: dict[str, str] | None = None, **overrides: Any
) -> list[str]:
    path = tmp_path / "broker.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        Settings.load(path, overrides, env or {})
    assert str(refused.value).count("\n") == len(refused.value.fields["problems"])
    return list(refused.value.fields["problems"])


def loaded(overrides: dict[str, Any] | None = None, env: dict[str, str] | None = None) -> Settings:
    return Settings.load(
        None, {"server.trust_domain": "example.org", **(overrides or {})}, env or {}
    )


def test_a_trust_domain_is_all_it_takes() -> None:
    settings = loaded({"server.data_dir": "/srv/idb"})
    assert settings.server.trust_domain == TrustDomain("example.org")
    assert settings.server.admin_socket == Path("/srv/idb/admin.sock")
    assert settings.server.bundle_file == Path("/srv/idb/bundle.pem")
    assert settings.database_url == "sqlite:////srv/idb/broker.db"
    assert settings.ca.file.directory == Path("/srv/idb/keys")
    assert settings.svid.x509_ttl == timedelta(hours=1)
    assert settings.ca.key_algorithm is KeyAlgorithm.EC_P256


def test_later_sources_win(tmp_path: Path) -> None:
    path = tmp_path / "broker.toml"
    path.write_text(
        '[server]\ntrust_domain = "file.example"\naddress = "127.0.0.1:1"\n'
        'http_address = "127.0.0.1:2"\n[log]\nlevel = "debug"\n'
    )
    settings = Settings.load(
        path,
        {"log": {"level": "error"}},
        {"IDB_SERVER__ADDRESS": "127.0.0.1:3", "IDB_LOG__LEVEL": "warning"},
    )
    assert str(settings.server.trust_domain) == "file.example"
    assert settings.server.address == "127.0.0.1:3"
    assert settings.server.http_address == "127.0.0.1:2"
    assert settings.log.level == "error"


def test_all_problems_come_at_once_with_source_key_and_rule(tmp_path: Path) -> None:
    found = problems(
        f"""
sever = 1
[server]
trust_domain = "Example.org"
adress = "127.0.0.1:1"
http_address = "127.0.0.1"
[openbao]
token = "{SECRET}"
[svid]
x509_ttl = "1 hour"
jwt_ttl = "2h"
[ca]
upstream = "vault_pki"
""",
        tmp_path,
        {"IDB_LOG__LEVEL": "loud"},
        **{"log.format": "xml"},
    )
    assert found == [
        'broker.toml: sever: unknown key; did you mean "server"?',
        'broker.toml: server.trust_domain: must be a trust domain name such as "example.org"',
        'broker.toml: server.http_address: must be "host:port", such as "127.0.0.1:8081"; '
        "port 0 takes a free one",
        'broker.toml: server.adress: unknown key; did you mean "server.address"?',
        'broker.toml: openbao.token: unknown key; did you mean "openbao.token_file"?',
        'broker.toml: svid.x509_ttl: must be a duration such as "45s", "15m" or "1h30m"',
        "IDB_LOG__LEVEL: log.level: must be 'debug', 'info', 'warning' or 'error'",
        "command line: log.format: must be 'json' or 'console'",
        "broker.toml: svid.jwt_ttl: must not be longer than svid.max_jwt_ttl",
        "broker.toml: openbao.address: required when OpenBao is used",
        'broker.toml: openbao.role_id_file: required when openbao.auth is "approle"',
        "broker.toml: openbao.secret_id_file: set either openbao.secret_id_file or "
        "openbao.wrapped_secret_id_file",
    ]


@pytest.mark.parametrize("key", sorted(known_keys()))
@pytest.mark.parametrize("mistyped", [False, True])
def test_a_secret_in_the_wrong_place_is_never_shown(
    key: str, mistyped: bool, tmp_path: Path
) -> None:
    spoken = f"{key}x" if mistyped else key
    settings: Settings | None
    try:
        settings = loaded({spoken: SECRET, "server.data_dir": str(tmp_path)})
    except ConfigError as exc:
        shown = f"{exc} {exc.fields!r}"
        settings = None
    else:
        shown = ""
    assert SECRET not in shown
    if settings is None:
        return
    # A free text or a path that is only written to: legal, so no error can show it.
    assert not mistyped
    assert settings.store.url.get_secret_value() != SECRET


def test_a_secret_in_a_broken_line_is_never_shown(tmp_path: Path) -> None:
    for line in (f"token {SECRET}", f'token = "{SECRET}', f"token = {SECRET}", f'"{SECRET}" = '):
        found = problems(f"[server]\n{line}\n", tmp_path)
        assert found[0].startswith("broker.toml: not valid TOML at ")
        assert SECRET not in str(found)


def test_a_quoted_key_of_odd_shape_is_not_repeated(tmp_path: Path) -> None:
    found = problems('[server]\ntrust_domain = "a.b"\n"my secret key!" = 1\n', tmp_path)
    assert found == ["broker.toml: server.(unprintable): unknown key"]


def test_toml_errors_name_the_line(tmp_path: Path) -> None:
    assert problems("[server]\n\nx = = 1\n", tmp_path)[0] == (
        "broker.toml: not valid TOML at line 3, column 5"
    )


def test_a_file_that_is_not_there_is_one_problem(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        Settings.load(tmp_path / "none.toml", None, {})
    assert "none.toml: the file cannot be read (no such file or directory)" in str(refused.value)


def test_not_utf8_is_one_problem(tmp_path: Path) -> None:
    path = tmp_path / "broker.toml"
    path.write_bytes(b"[server]\nx = '\xff'")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 14"):
        Settings.load(path, None, {})


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    found = problems(
        f"""
[server]
trust_domain = "example.org"
[ca]
upstream = "disk"
[ca.disk]
cert_file = "ca.pem"
key_file = "{tmp_path}"
""",
        tmp_path,
    )
    assert found == [
        "broker.toml: ca.disk.cert_file: the file cannot be read (no such file or directory)",
        "broker.toml: ca.disk.key_file: the file cannot be read (is a directory)",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broker.toml"
    path.touch(mode=0)
    with pytest.raises(ConfigError, match="permission denied"):
        Settings.load(path, None, {})


def test_relative_paths_are_relative_to_their_file(tmp_path: Path) -> None:
    folder = tmp_path / "etc"
    folder.mkdir()
    path = folder / "broker.toml"
    path.write_text('[server]\ntrust_domain = "example.org"\ndata_dir = "state"\n')
    settings = Settings.load(path, None, {})
    assert settings.server.data_dir == folder / "state"
    assert settings.server.admin_socket == folder / "state" / "admin.sock"


@pytest.mark.parametrize(
    ("key", "shortest", "longest", "below", "above"),
    [
        ("server.drain_timeout", "100ms", "5m", "99ms", "5m1ms"),
        ("openbao.timeout", "100ms", "5m", "99ms", "5m1ms"),
        ("svid.x509_ttl", "10s", "24h", "9s", "24h1s"),
        ("svid.jwt_ttl", "1s", "1h", "999ms", "24h1s"),
        ("svid.node_ttl", "10s", "6d", "9s", "7d1s"),
        ("svid.max_x509_ttl", "1h", "24h", "9s", "24h1s"),
        ("svid.max_jwt_ttl", "5m", "24h", "999ms", "24h1s"),
        ("ca.x509_ca_ttl", "1h", "3650d", "59s", "3651d"),
        ("ca.jwt_key_ttl", "5m", "3650d", "59s", "3651d"),
        ("ledger.unconfirmed_after", "1s", "1h", "999ms", "1h1s"),
        ("ledger.retain_expired", "0s", "3650d", "-1s", "3651d"),
        ("bundle.refresh_hint", "1s", "24h", "999ms", "24h1s"),
        ("revocation.crl_validity", "1s", "24h", "999ms", "24h1s"),
        ("revocation.ocsp_validity", "1s", "24h", "999ms", "24h1s"),
        ("revocation.acknowledge_timeout", "100ms", "5m", "99ms", "5m1ms"),
    ],
)
def test_every_duration_has_a_shortest_and_a_longest(
    key: str, shortest: str, longest: str, below: str, above: str
) -> None:
    for fine in (shortest, longest):
        loaded({key: fine})
    for wrong in (below, above):
        with pytest.raises(ConfigError, match=f"{key}: must be"):
            loaded({key: wrong})


def test_the_duration_table_above_is_complete() -> None:
    mark = test_every_duration_has_a_shortest_and_a_longest.pytestmark[0]  # type: ignore[attr-defined]
    tested = {case[0] for case in mark.args[1]}
    shown = loaded().masked()
    durations = {
        key for key in known_keys() if isinstance(_value(loaded(), key), timedelta) and key in shown
    }
    assert tested == durations


def _value(settings: Settings, key: str) -> object:
    value: object = settings
    for name in key.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (
            {"server.address": "127.0.0.1:1", "server.http_address": "127.0.0.1:1"},
            "server.http_address",
        ),
        ({"svid.x509_ttl": "2h", "svid.max_x509_ttl": "1h"}, "svid.x509_ttl"),
        ({"svid.node_ttl": "8d"}, "svid.node_ttl"),
        ({"ca.jwt_key_algorithm": "ed25519"}, "ca.jwt_key_algorithm"),
        ({"ca.upstream": "disk"}, "ca.disk.cert_file"),
        ({"ca.key_manager": "transit"}, "openbao.address"),
        ({"limits.issue_burst": 10}, "limits.issue_burst"),
        ({"store.url": "sqlite://"}, "store.url"),
        ({"store.url": "mysql://x"}, "store.url"),
        ({"server.admin_socket": "/" + "s" * 110}, "server.admin_socket"),
        ({"server.address": "127.0.0.1:65536"}, "server.address"),
        ({"server.address": "[::g]:1"}, "server.address"),
        ({"server": 3}, "server"),
        ({"ca.disk": "x"}, "ca.disk"),
        ({"openbao.address": "http://user:pw@host"}, "openbao.address"),
        ({"limits.issue_per_second": "nan"}, "limits.issue_per_second"),
    ],
)
def test_rules_between_and_inside_fields(overrides: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Settings.load(None, {"server.trust_domain": "example.org", **overrides}, {})
    assert any(f": {key}: " in problem for problem in refused.value.fields["problems"])


def test_url_and_url_file_contradict_each_other(tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text("postgresql://u:p@localhost/idb\n")
    assert loaded({"store.url_file": str(file)}).database_url == "postgresql://u:p@localhost/idb"
    with pytest.raises(ConfigError, match=r"set either store\.url or store\.url_file"):
        loaded({"store.url_file": str(file), "store.url": "sqlite:////x.db"})


def test_a_missing_required_key_says_how_to_set_it() -> None:
    with pytest.raises(ConfigError, match=r"server\.trust_domain: required \(or IDB_SERVER__TRUST"):
        Settings.load(None, {}, {})


def test_show_masks_the_password() -> None:
    settings = loaded({"store.url": "postgresql://idb:hunter2@localhost/idb"})
    shown = settings.masked()
    assert shown["store.url"] == "postgresql://********"
    assert set(shown) == set(known_keys())
    assert "hunter2" not in repr(settings) + str(shown)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        loaded().log.level = "debug"  # type: ignore[assignment]


def test_constructing_settings_directly_keeps_the_rules() -> None:
    with pytest.raises(ValidationError, match="must not be longer than") as refused:
        Settings.model_validate(
            {
                "server": {"trust_domain": "example.org"},
                "svid": {"x509_ttl": "9h", "max_x509_ttl": "8h"},
            }
        )
    assert "9h" not in str(refused.value)


def test_every_field_is_described_and_in_the_reference() -> None:
    reference = reference_markdown()
    for key in known_keys():
        assert f"| `{key}` |" in reference

    def walk(model: type[BaseModel]) -> None:
        assert model.__doc__
        for name, info in model.model_fields.items():
            if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
                walk(info.annotation)
            else:
                assert (info.description or "").endswith("."), name

    walk(Settings)


def test_secrets_are_references() -> None:
    """A field that could hold a secret is a file, but for the database's URL."""
    secret_words = ("token", "secret", "password", "key")
    allowed = {
        "x509_key",
        "jwt_key",
        "key_algorithm",
        "key_manager",
        "jwt_key_algorithm",
        "jwt_key_ttl",
    }
    for key in known_keys():
        leaf = key.rpartition(".")[2]
        if any(word in leaf for word in secret_words):
            assert leaf.endswith("_file") or leaf in allowed, key
    assert isinstance(loaded().store.url, SecretStr)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    st.dictionaries(st.sampled_from([*known_keys(), "server", "ca.disk", "x"]), JSON, max_size=5)
)
def test_no_value_of_any_shape_breaks_loading(overrides: dict[str, Any]) -> None:
    with suppress(ConfigError):  # the one way to refuse
        Settings.load(None, overrides, {})
