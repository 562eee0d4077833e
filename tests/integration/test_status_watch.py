"""Who watches the watchers: our own lists and OCSP answers, looked at from outside."""

from __future__ import annotations

import asyncio
import http.server
import re
import sqlite3
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from identity_broker.domain.clock import SystemClock
from identity_broker.domain.events import AuditKind
from identity_broker.server.jobs.status_watch import StatusWatch
from identity_broker.server.probe import Expected, Sighting, StatusProbe
from identity_broker.store import Store
from identity_broker.telemetry.metrics import Metrics
from identity_ca.authority import AuthorityKind
from support.broker import DevBroker
from support.line import AttestedClient, RunningBroker, running, settings_in


async def _expected(broker: RunningBroker, node: AttestedClient, entry_id: str) -> Expected:
    """Two credentials: one revoked, one good."""
    from identity_api.broker.v1 import authority_pb2

    revoked = (await node.issue(entry_id)).svid
    good = (await node.issue(entry_id)).svid
    stub = await broker.authorities()
    listed = await stub.List(
        authority_pb2.ListAuthoritiesRequest(kind=authority_pb2.AUTHORITY_KIND_X509)
    )
    [authority] = listed.authorities
    await broker.revoke(id=revoked.serial)
    return Expected(
        authority.id,
        authority.certificate_chain[0],
        frozenset({int(revoked.serial, 16)}),
        (int(good.serial, 16),),
    )


def _problems(sightings: list[Sighting]) -> str:
    return "; ".join(f"{each.check}: {each.problem}" for each in sightings if each.problem)


class Liar:
    """An HTTP server in front of a broker that can answer with what it kept."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.kept: dict[str, bytes] = {}
        self.lies: dict[str, bytes] = {}
        self.address = ""

    def answer(self, path: str) -> tuple[str, bytes]:
        """What is sent: a lie where there is one for such a path."""
        with urllib.request.urlopen(f"http://{self.upstream}{path}", timeout=5) as response:
            kind, body = response.headers["content-type"], response.read()
        for pattern, lie in self.lies.items():
            if re.fullmatch(pattern, path):
                body = lie
        self.kept[path] = body
        return kind, body


@contextmanager
def lying(upstream: str) -> Iterator[Liar]:
    liar = Liar(upstream)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, body = liar.answer(self.path)
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        liar.address = f"127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield liar
        finally:
            server.shutdown()
            thread.join()


async def test_what_is_published_agrees_with_the_ledger(broker: RunningBroker) -> None:
    node = await broker.join("watched")
    entry = await broker.entry("/shop/watched", "watched")
    expected = await _expected(broker, node, entry.id)
    probe = StatusProbe(broker.addresses.http_address)
    now = SystemClock().now()
    sightings = await asyncio.to_thread(probe.look, expected, now)
    for _ in range(100):
        if not _problems(sightings):
            break
        await asyncio.sleep(0.05)
        sightings = await asyncio.to_thread(probe.look, expected, now)
    assert _problems(sightings) == ""
    assert len(sightings) == 3


async def test_every_lie_is_seen(tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "b", ca={"key_manager": "memory"})
    other = settings_in(tmp_path / "o", ca={"key_manager": "memory"})
    async with running(settings) as broker, running(other) as stranger:
        node = await broker.join("watched")
        entry = await broker.entry("/shop/watched", "watched")
        with lying(broker.addresses.http_address) as liar:
            nothing_yet = await _expected(broker, node, entry.id)
            authority_id = nothing_yet.authority_id
            full, delta = f"/crl/{authority_id}.crl", f"/crl/{authority_id}/delta.crl"
            probe = StatusProbe(liar.address)

            async def look(expected: Expected) -> str:
                now = SystemClock().now()
                return _problems(await asyncio.to_thread(probe.look, expected, now))

            for _ in range(100):
                if not await look(nothing_yet):
                    break
                await asyncio.sleep(0.05)
            assert await look(nothing_yet) == ""
            old_full, old_delta = liar.kept[full], liar.kept[delta]

            # A list of before the next revocation: the serial is missing.
            expected = await _expected(broker, node, entry.id)
            liar.lies = {re.escape(full): old_full}
            assert "are not on it" in await look(expected)
            # Its number has been seen to be higher: it goes back.
            liar.lies = {}
            for _ in range(100):
                if not await look(expected):
                    break
                await asyncio.sleep(0.05)
            liar.lies = {re.escape(full): old_full, re.escape(delta): old_delta}
            assert "went back" in await look(nothing_yet)
            # What was revoked is answered good, by an answer about another serial number.
            liar.lies = {}
            [good] = expected.good
            swapped = Expected(authority_id, expected.certificate, frozenset({good}), ())
            assert "is GOOD, should be REVOKED" in await look(swapped)
            ocsp = next(body for path, body in liar.kept.items() if path.startswith("/ocsp/"))
            liar.lies = {"/ocsp/.*": ocsp}
            assert "another serial number" in await look(expected)
            # Somebody else's list.
            theirs = await _expected(
                stranger,
                await stranger.join("w"),
                (await stranger.entry("/shop/w", "w")).id,
            )
            foreign = f"http://{stranger.addresses.http_address}/crl/{theirs.authority_id}.crl"
            liar.lies = {
                re.escape(full): await asyncio.to_thread(
                    lambda: urllib.request.urlopen(foreign, timeout=5).read()
                )
            }
            assert "signature is not the authority's" in await look(expected)
            liar.lies = {re.escape(full): b"no list"}
            assert "cannot be fetched or read" in await look(expected)
            # A good one is called revoked.
            liar.lies = {}
            wrong = Expected(
                authority_id, expected.certificate, frozenset(), tuple(expected.revoked)
            )
            assert "is on it and was not revoked" in await look(wrong)
            # It is old: a clock far ahead sees that nothing fresh is published.
            late = SystemClock().now() + timedelta(hours=2)
            assert "not fresh" in _problems(await asyncio.to_thread(probe.look, expected, late))


async def test_a_revocation_that_memory_missed_is_seen(tmp_path: Path) -> None:
    """The ledger alone knows of it: lists and answers are made from memory."""
    settings = settings_in(tmp_path / "b", ca={"key_manager": "memory"})
    async with running(settings) as broker:
        node = await broker.join("watched")
        entry = await broker.entry("/shop/watched", "watched")
        missed = (await node.issue(entry.id)).svid
        await broker.ledger()  # what was issued is written
        with sqlite3.connect(tmp_path / "b" / "broker.db", timeout=10) as database:
            changed = database.execute(
                "UPDATE credentials SET state = 'revoked', reason = 1, order_id = 'x',"
                " revoked_at = not_before WHERE id = ?",
                (missed.serial,),
            )
            assert changed.rowcount == 1
        database.close()
        store = Store(settings.database_url, clock=SystemClock())
        metrics = Metrics()
        await store.migrate()
        try:
            known = await store.read(lambda repos: repos.authorities.all())
            authorities = tuple(one for one in known if one.kind is AuthorityKind.X509)
            watch = StatusWatch(
                address=lambda: broker.addresses.http_address,
                authorities=lambda: authorities,
                store=store,
                clock=SystemClock(),
                metrics=metrics,
            )
            await watch.run()
        finally:
            await store.close()
        assert b'idb_status_sightings_total{outcome="wrong"} 1.0' in metrics.render()


async def test_a_disagreement_becomes_an_event_once(tmp_path: Path) -> None:
    """The job, at a listener that is not the broker's: everything is wrong there."""
    from contextlib import AsyncExitStack

    from identity_broker.server.parts import build_parts

    settings = settings_in(tmp_path / "b", ca={"key_manager": "memory"})
    async with AsyncExitStack() as resources:
        parts = await build_parts(settings, SystemClock(), resources)
        watch = StatusWatch(
            address=lambda: "127.0.0.1:9",
            authorities=lambda: parts.signing.authorities.x509_set.trusted,
            store=parts.store,
            clock=parts.clock,
            metrics=parts.metrics,
        )
        await watch.run()
        await watch.run()
        events = await parts.store.read(
            lambda repos: [
                event
                for event in repos.audit.page("", 100).items
                if event.kind is AuditKind.STATUS_DISAGREES
            ]
        )
        assert len(events) == 2
        assert all(event.facts["problem"] for event in events)
        assert b'idb_status_sightings_total{outcome="wrong"}' in parts.metrics.render()


def test_doctor_looks_as_well(dev_broker: DevBroker) -> None:
    findings = dev_broker.idb("doctor", "-o", "json").json["findings"]
    seen = {each["check"].partition(" of ")[0]: each["verdict"] for each in findings}
    # `idb dev` has a public address: its certificates name the parts of the list.
    wanted = {"revocation list", "delta list", "part", "OCSP"}
    assert {name: seen.get(name) for name in wanted} == dict.fromkeys(wanted, "ok")
