from __future__ import annotations

import io
import json
import logging
from datetime import UTC, datetime
from typing import Any

import pytest
import structlog
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from identity_broker.config.settings import LogFormat, LogLevel
from identity_broker.telemetry import logs
from identity_broker.telemetry.redaction import redact, redact_event

PEM = (
    ec.generate_private_key(ec.SECP256R1())
    .private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    .decode()
)
SECRETS = {
    "private key": (PEM, PEM.splitlines()[1]),
    "cut private key": (PEM[:120], PEM.splitlines()[1][:40]),
    "jwt": ("eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJzcGlmZmUifQ.c2lnbmF0dXJl", "c2lnbmF0dXJl"),
    "join token": ("idbt_3q2-7wAbCdEfGhIjKlMn", "3q2-7wAb"),
    "vault service token": ("hvs.CAESIJ1234567890abcdefghij", "CAESIJ"),
    "vault batch token": ("hvb.AAAAAQ1234567890abcdefghij", "AAAAAQ"),
    "openbao token": ("s.abcdefghijklmnopqrstuvwx", "abcdefghij"),
    "password in a url": ("postgresql://idb:hunter2@db/idb", "hunter2"),
    "bearer": ("Authorization: Bearer abcdef0123456789", "abcdef0123456789"),
    "password in a dsn": ("host=db password=hunter2 dbname=x", "hunter2"),
}


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_taken_out_wherever_it_stands(name: str) -> None:
    text, core = SECRETS[name]
    assert core in text
    for value in (
        text,
        f"failed: {text}, sorry",
        [text],
        {"a": (text,)},
        {text: 1},
        ValueError(text),
    ):
        event: dict[str, Any] = {"event": "x", "detail": value}
        assert core not in repr(redact_event(None, "info", event))
    assert core not in repr(redact_event(None, "info", {"event": text}))


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("format", list(LogFormat))
def test_a_secret_is_taken_out_of_the_log_as_configured(name: str, format: LogFormat) -> None:
    text, core = SECRETS[name]
    stream = io.StringIO()
    logs.configure(LogLevel.DEBUG, format, stream)
    log = logs.get_logger("test")
    log.info("said", detail=text)
    logging.getLogger("library").warning("lib said %s", text)
    try:
        raise RuntimeError(text)
    except RuntimeError:
        log.exception("failed")
    assert stream.getvalue().count("said") >= 2
    assert core not in stream.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        "spiffe://example.org/payments/api",
        "0123456789abcdef0123456789abcdef01234567",
        "identity_broker.server.rpc.services.svid",
        "https://openbao.example.org:8200/v1/transit/sign",
        "-----BEGIN CERTIFICATE-----",
        "2026-11-21T17:31:19Z",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.text() | st.integers() | st.floats() | st.binary() | st.datetimes(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner),
            max_leaves=8,
        ),
    )
)
def test_no_value_breaks_redaction_or_rendering(fields: dict[str, Any]) -> None:
    stream = io.StringIO()
    logs.configure(LogLevel.INFO, stream=stream)
    structlog.get_logger().info("x", **{f"k{k}": v for k, v in fields.items()})
    assert json.loads(stream.getvalue())["event"] == "x"


def test_lines_are_json_with_the_call_they_belong_to() -> None:
    stream = io.StringIO()
    logs.configure(LogLevel.INFO, stream=stream)
    import contextvars

    def during_a_call() -> None:
        logs.bind_call("c-1", "/a/B", "uid:0")
        logs.get_logger("part").info("happened", at=datetime(2026, 1, 2, tzinfo=UTC))
        logging.getLogger("library").warning("too")
        logs.get_logger("part").debug("unseen")

    contextvars.copy_context().run(during_a_call)
    logs.get_logger("part").info("outside")
    during, library, outside = map(json.loads, stream.getvalue().splitlines())
    assert during["part"] == "part"
    assert during["level"] == "info"
    assert during["timestamp"].endswith("Z")
    assert during["at"].startswith("2026-01-02")
    for line in (during, library):
        assert (line["correlation_id"], line["method"], line["caller"]) == ("c-1", "/a/B", "uid:0")
    assert "correlation_id" not in outside


def test_a_logger_made_at_import_follows_a_later_configuration() -> None:
    log = logs.get_logger("early")
    stream = io.StringIO()
    logs.configure(LogLevel.WARNING, stream=stream)
    log.info("unseen")
    log.warning("seen")
    assert "unseen" not in stream.getvalue()
    assert '"seen"' in stream.getvalue()
