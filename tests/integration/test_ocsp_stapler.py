"""Asking for an OCSP answer to staple: responders that lie, stall, or come back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import AuthorityInformationAccessOID

from identity_broker.cli import svid_staple
from identity_broker.cli.svid_staple import Stapler, responder_urls
from identity_ca.ocsp import (
    CertStatus,
    OcspRequest,
    OcspSigner,
    ResponseStatus,
    SingleAnswer,
    parse_request,
    refusal,
)
from support.ca import forge, hierarchy, leaf_extensions, replaced
from support.ca_material import NOW, signing_key
from support.store import SettableClock

BELOW = hierarchy()
SIGNER = OcspSigner(certificate=BELOW.intermediate, key=BELOW.issuer.key)
VALIDITY = timedelta(minutes=10)
OCSP = AuthorityInformationAccessOID.OCSP


@dataclass
class Scripted:
    """A responder that answers what it is told to; `asked` are the requests it got."""

    clock: SettableClock
    status: CertStatus = CertStatus.GOOD
    answer: Callable[[BaseHTTPRequestHandler], None] | None = None
    asked: list[bytes] = field(default_factory=list)
    url: str = ""

    def honest(self, request: bytes) -> bytes:
        read = parse_request(request)
        assert isinstance(read, OcspRequest)
        now = self.clock.now()
        since = now if self.status is CertStatus.REVOKED else None
        single = SingleAnswer(
            read.cert_ids[0].der, self.status, now, now + VALIDITY, revoked_at=since
        )
        return SIGNER.sign([single], produced_at=now)


@pytest.fixture
def responder() -> Iterator[Scripted]:
    scripted = Scripted(SettableClock(NOW))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["content-type"] == "application/ocsp-request"
            body = self.rfile.read(int(self.headers["content-length"]))
            scripted.asked.append(body)
            if scripted.answer is not None:
                scripted.answer(self)
                return
            reply(self, scripted.honest(body))

        def log_message(self, format: str, *arguments: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    scripted.url = f"http://127.0.0.1:{server.server_address[1]}/ocsp"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
    yield scripted
    server.shutdown()
    server.server_close()


def reply(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200) -> None:
    handler.send_response(status)
    handler.send_header("content-length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@dataclass(frozen=True)
class Held:
    """What a stapler looks at of a snapshot."""

    serial: str
    svid: Any
    bundle: Any


@dataclass(frozen=True)
class Chain:
    cert_chain: list[x509.Certificate]


@dataclass(frozen=True)
class Anchors:
    x509_authorities: set[x509.Certificate]


def held(*urls: str, with_issuer: bool = True) -> Any:
    """A certificate that names these responders, below the intermediate."""
    key = signing_key(nth=50)
    extensions = leaf_extensions()
    if urls:
        access = x509.AuthorityInformationAccess(
            [x509.AccessDescription(OCSP, x509.UniformResourceIdentifier(url)) for url in urls]
        )
        extensions = replaced(extensions, access, critical=False)
    leaf = forge(
        subject="",
        key=key,
        issuer=BELOW.intermediate,
        issuer_key=BELOW.issuer.key,  # type: ignore[arg-type]
        extensions=extensions,
    )
    chain = [leaf, BELOW.intermediate] if with_issuer else [leaf]
    return Held(f"{leaf.serial_number:x}", Chain(chain), Anchors({BELOW.root}))


async def test_it_is_asked_again_at_half_of_the_validity(
    responder: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = responder.clock
    stapler, svid = Stapler(clock), held(responder.url)
    assert not stapler.is_due()
    first = await stapler.answer(svid)
    assert first is not None
    assert await stapler.answer(svid) == first
    clock.time += VALIDITY / 2 - timedelta(seconds=2)
    assert not stapler.is_due()
    clock.time += timedelta(seconds=2)
    assert stapler.is_due()
    second = await stapler.answer(svid)
    assert second not in (None, first)
    assert len(responder.asked) == 2
    # Another SVID has another answer, at once.
    assert await stapler.answer(held(responder.url)) not in (None, first, second)
    assert capsys.readouterr().err == ""


async def test_an_answer_lasts_as_long_as_it_says_when_nobody_answers_any_more(
    responder: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = responder.clock
    stapler, svid = Stapler(clock), held(responder.url)
    first = await stapler.answer(svid)
    responder.answer = lambda handler: reply(handler, b"", 503)
    clock.time += VALIDITY / 2
    assert await stapler.answer(svid) == first
    assert "no current OCSP answer" in capsys.readouterr().err
    asked = len(responder.asked)
    assert await stapler.answer(svid) == first  # not asked again at once
    assert len(responder.asked) == asked
    clock.time += VALIDITY / 2
    assert await stapler.answer(svid) is None
    assert capsys.readouterr().err == ""  # told once
    responder.answer = None
    clock.time += timedelta(seconds=15)
    assert stapler.is_due()
    assert await stapler.answer(svid) is not None


async def test_revoked_is_an_answer_and_unknown_is_none(
    responder: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    responder.status = CertStatus.REVOKED
    assert await Stapler(responder.clock).answer(held(responder.url)) is not None
    assert "revoked" in capsys.readouterr().err
    responder.status = CertStatus.UNKNOWN
    assert await Stapler(responder.clock).answer(held(responder.url)) is None
    assert "does not know this SVID" in capsys.readouterr().err


def drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    for _ in range(1000):
        try:
            handler.wfile.write(b"x")
        except OSError:
            return
        time.sleep(0.05)


def redirect(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("location", "http://127.0.0.1:1/")
    handler.send_header("content-length", "0")
    handler.end_headers()


@pytest.mark.parametrize(
    "answer",
    [
        lambda handler: reply(handler, b"rubbish"),
        lambda handler: reply(handler, b""),
        lambda handler: reply(handler, b"x" * 100_000),
        lambda handler: reply(handler, refusal(ResponseStatus.TRY_LATER)),
        lambda handler: handler.wfile.write(b"nonsense\r\n\r\n"),
        lambda handler: None,
        redirect,
        drip,
        lambda handler: time.sleep(2.0),
    ],
    ids=["rubbish", "empty", "long", "later", "no http", "closed", "redirect", "drip", "stall"],
)
async def test_what_is_no_answer_delays_nothing_for_long(
    responder: Scripted, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svid_staple, "_PATIENCE_SECONDS", 0.5)
    responder.answer = answer
    started = time.monotonic()
    assert await Stapler(responder.clock).answer(held(responder.url)) is None
    assert time.monotonic() - started < 2.0
    assert responder.asked
    await asyncio.sleep(0)


async def test_an_answer_about_another_certificate_is_none(responder: Scripted) -> None:
    stapler = Stapler(responder.clock)
    assert await stapler.answer(held(responder.url)) is not None
    [request] = responder.asked
    responder.answer = lambda handler: reply(handler, responder.honest(request))
    assert await stapler.answer(held(responder.url)) is None


async def test_where_there_is_nobody_to_ask(
    responder: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    stapler = Stapler(responder.clock)
    for svid, said in (
        (held(), "names no OCSP responder"),
        (held("ldap://127.0.0.1/x", "file:///etc/passwd"), ""),  # told once
        (held(responder.url, with_issuer=False), "does not bring its issuer"),
    ):
        assert await stapler.answer(svid) is None
        assert not stapler.is_due()
        told = capsys.readouterr().err
        assert (said in told) if said else told == ""
    assert not responder.asked
    leaf = held("ldap://x", responder.url).svid.cert_chain[0]
    assert responder_urls(leaf) == [responder.url]
    assert responder_urls(BELOW.root) == []
