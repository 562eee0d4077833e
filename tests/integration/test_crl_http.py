"""Revocation lists over HTTP: what is in them, how fresh they are, what OpenSSL makes of them."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import AuthorityInformationAccessOID

from identity_broker.domain.clock import Clock, SystemClock
from identity_broker.errors import (
    AuthorityNotFound,
    AuthorityUnavailable,
    BrokerError,
    SigningBackendUnavailable,
)
from identity_broker.lifecycle.crl.document import ListDocument, ListKind
from identity_broker.server.http import crl as crl_module
from identity_broker.server.http.app import build_app
from identity_broker.server.http.crl import ListsBeingRead, crl_routes
from identity_broker.server.http.listener import HttpListener
from identity_broker.server.http.readiness import Readiness
from identity_broker.telemetry.metrics import Metrics
from identity_ca.distribution import DistributionPoints, Shard
from support.line import AttestedClient, RunningBroker, running
from support.lists import (
    Chain,
    base_of,
    below_a_file,
    fetched,
    list_url,
    number_of,
    parsed,
    public_settings,
    reasons,
    serials,
    signed_by,
)
from support.store import SettableClock

HOLD = 6
STOLEN = 1


def upstream_tables(kind: str, folder: Path) -> dict[str, Any]:
    """No authority above ours, or one whose key is a file."""
    return below_a_file(folder) if kind == "disk" else {"ca": {"key_manager": "memory"}}


class Site:
    """A broker with a public address, a node and its entry."""

    def __init__(self, broker: RunningBroker, node: AttestedClient, entry_id: str, folder: Path):
        self.broker = broker
        self.node = node
        self.entry_id = entry_id
        self.folder = folder
        self.base = broker.settings.revocation.public_url or ""

    async def svid(self) -> Chain:
        svid = (await self.node.issue(self.entry_id)).svid
        folder = self.folder / svid.serial
        return Chain.of(folder, list(svid.cert_chain), self.broker.bundle_pem)

    async def index(self) -> list[dict[str, Any]]:
        answer = await fetched(f"{self.base}/crl")
        assert answer.status_code == 200
        found: list[dict[str, Any]] = answer.json()["lists"]
        return found

    async def get(self, url: str) -> bytes:
        answer = await fetched(url)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/pkix-crl")
        return answer.content


@pytest.fixture(params=["selfsigned", "disk"])
async def site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Site]:
    tables = upstream_tables(request.param, tmp_path / "upstream")
    async with running(public_settings(tmp_path / "idb", **tables)) as broker:
        node = await broker.join("web-1")
        entry = await broker.entry("/payments/api", "web-1")
        yield Site(broker, node, entry.id, tmp_path)


async def test_every_kind_of_list_and_what_openssl_says(site: Site) -> None:
    good, bad = await site.svid(), await site.svid()
    while list_url(good.leaf) == list_url(bad.leaf):
        good = await site.svid()
    [own, *above] = await site.index()
    before = await site.get(own["url"])
    top = [await site.get(one["url"]) for one in above]
    await site.broker.revoke(id=bad.serial, reason=STOLEN)

    # The part that each certificate names, and no other one's.
    parts = {chain.serial: await site.get(list_url(chain.leaf)) for chain in (good, bad)}
    assert good.verdict(parts[good.serial]) == ""
    assert "certificate revoked" in bad.verdict(parts[bad.serial])
    assert "different CRL scope" in good.verdict(parts[bad.serial]).replace(
        "Different", "different"
    )
    [part] = parsed([parts[bad.serial]])
    scope = part.extensions.get_extension_for_class(x509.IssuingDistributionPoint)
    assert scope.critical
    assert scope.value.full_name == [x509.UniformResourceIdentifier(list_url(bad.leaf))]
    assert serials(part) == [bad.serial]

    # The delta, with the list that a verifier has from before.
    delta = await site.get(own["delta_url"])
    with_deltas = ("-crl_check", "-use_deltas", "-extended_crl")
    assert bad.verdict(before) == ""
    assert "certificate revoked" in bad.verdict(before, delta, options=with_deltas)
    assert good.verdict(before, delta, options=with_deltas) == ""
    [changes] = parsed([delta])
    assert base_of(changes) <= number_of(*parsed([before])) < number_of(changes)

    # The full list: after a moment, and for whole chains with what the upstream says.
    full = await _until_listed(site, own["url"], bad.serial)
    assert good.verdict(full) == ""
    assert "certificate revoked" in bad.verdict(full)
    whole = ("-crl_check_all",)
    assert good.verdict(full, *top, options=whole) == ""
    assert "certificate revoked" in bad.verdict(full, *top, options=whole)
    assert bool(top) is (site.broker.settings.ca.upstream == "disk")
    [freshest] = parsed([full])[0].extensions.get_extension_for_class(x509.FreshestCRL).value
    assert freshest.full_name == [x509.UniformResourceIdentifier(own["delta_url"])]


async def _until_listed(site: Site, url: str, serial: str) -> bytes:
    async with asyncio.timeout(10):
        while True:
            der = await site.get(url)
            if serial in serials(parsed([der])[0]):
                return der
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("site", ["selfsigned"], indirect=True)
class TestOneSite:
    """What does not depend on the upstream."""

    async def test_certificates_say_where_to_ask(self, site: Site) -> None:
        chain = await site.svid()
        number = int(chain.serial, 16) % 64
        [own] = await site.index()
        assert list_url(chain.leaf) == f"{site.base}/crl/{own['authority_id']}/{number}-of-64.crl"
        access = chain.leaf.extensions.get_extension_for_class(x509.AuthorityInformationAccess)
        [ocsp] = access.value
        assert ocsp.access_method == AuthorityInformationAccessOID.OCSP
        assert ocsp.access_location.value == f"{site.base}/ocsp"

    async def test_published_soon_after_the_command_has_returned(self, site: Site) -> None:
        bad = await site.svid()
        [own] = await site.index()
        seconds = {}
        async with httpx.AsyncClient() as client:
            await site.broker.revoke(id=bad.serial, reason=STOLEN)
            returned = time.perf_counter()
            wanted = {"part": list_url(bad.leaf), "delta": own["delta_url"], "full": own["url"]}
            while wanted:
                for name, url in tuple(wanted.items()):
                    der = (await client.get(url)).content
                    if bad.serial in serials(parsed([der])[0]):
                        seconds[name] = time.perf_counter() - returned
                        del wanted[name]
        print({name: f"{value * 1000:.0f} ms" for name, value in seconds.items()})
        # A quarter of a second on an idle machine; this one may be busy.
        assert max(seconds.values()) < 5

    async def test_what_was_only_on_hold_comes_back(self, site: Site) -> None:
        held, bad = await site.svid(), await site.svid()
        [own] = await site.index()
        revoked = await site.broker.revoke(id=held.serial, reason=HOLD)
        await site.broker.revoke(id=bad.serial, reason=STOLEN)
        full = await _until_listed(site, own["url"], bad.serial)
        assert reasons(parsed([full])[0]) == {
            held.serial: x509.ReasonFlags.certificate_hold,
            bad.serial: x509.ReasonFlags.key_compromise,
        }
        assert "certificate revoked" in held.verdict(full)
        await site.broker.lift(revoked.revocation.hold)
        async with asyncio.timeout(5):
            while held.serial in reasons(parsed([delta := await site.get(own["delta_url"])])[0]):
                said = reasons(parsed([delta])[0])[held.serial]
                if said is x509.ReasonFlags.remove_from_crl:
                    break
                await asyncio.sleep(0.01)
        assert held.verdict(full, delta, options=("-crl_check", "-use_deltas")) == ""
        assert "revoked" in bad.verdict(full, delta, options=("-crl_check", "-use_deltas"))
        assert serials(parsed([await site.get(list_url(held.leaf))])[0]) != [held.serial]
        async with asyncio.timeout(5):
            while held.serial in serials(parsed([await site.get(own["url"])])[0]):
                await asyncio.sleep(0.01)

    async def test_numbers_grow_whatever_the_kind(self, site: Site) -> None:
        [own] = await site.index()
        seen: dict[str, int] = {}
        last = own["number"]
        for _ in range(3):
            bad = await site.svid()
            await site.broker.revoke(id=bad.serial)
            for url in (list_url(bad.leaf), own["delta_url"]):
                number = number_of(parsed([await site.get(url)])[0])
                assert number > seen.get(url, 0)
                assert number > last
                seen[url] = number
            last = number_of(parsed([await _until_listed(site, own["url"], bad.serial)])[0])

    async def test_a_reader_that_has_it_is_told_so(self, site: Site) -> None:
        [own] = await site.index()
        tag = ""
        async with httpx.AsyncClient() as client:
            for url in (own["url"], own["delta_url"], own["shard_url"].format(shard=5)):
                first = await client.get(url)
                tag = first.headers["etag"]
                assert first.headers["cache-control"] == "public, no-cache"
                for asked in (tag, f'"other", W/{tag}', "*"):
                    again = await client.get(url, headers={"if-none-match": asked})
                    assert (again.status_code, again.content) == (304, b"")
                    assert again.headers["etag"] == tag
                head = await client.head(url)
                assert (head.status_code, head.content) == (200, b"")
                assert head.headers["content-length"] == str(len(first.content))
                assert head.headers["content-type"] == "application/pkix-crl"
            bad = await site.svid()
            await site.broker.revoke(id=bad.serial)
            news = await client.get(list_url(bad.leaf), headers={"if-none-match": tag})
            assert news.status_code == 200
            pem_url = own["url"].removesuffix("crl") + "pem"
            text = await client.get(pem_url)
            assert text.headers["content-length"] == str(len(text.content))
            assert text.headers["etag"] != (await client.get(own["url"])).headers["etag"]
            x509.load_pem_x509_crl(text.content)
            assert x509.load_pem_x509_crl(text.content).public_bytes(Encoding.PEM) == text.content

    async def test_what_is_not_there(self, site: Site) -> None:
        [own] = await site.index()
        one = own["authority_id"]
        async with httpx.AsyncClient(base_url=site.base) as client:
            for path in (
                f"/crl/{'0' * 40}.crl",
                f"/crl/{'0' * 40}/delta.crl",
                f"/crl/{one}/64-of-64.crl",
                f"/crl/{one}/5-of-2000.crl",
                f"/crl/{one}/5.crl",
                f"/crl/{one}/../../bundle.crl",
                f"/crl/{one}.txt",
                f"/crl/{one}",
                f"/crl/{one}/5-of-64",
            ):
                assert (await client.get(path)).status_code == 404, path
            assert (await client.post(f"/crl/{one}.crl")).status_code == 405

    async def test_a_count_of_parts_from_before_is_answered(self, site: Site) -> None:
        """Certificates that were issued when the setting was another."""
        [own] = await site.index()
        bad = await site.svid()
        await site.broker.revoke(id=bad.serial)
        of = 48
        url = f"{site.base}/crl/{own['authority_id']}/{int(bad.serial, 16) % of}-of-{of}.crl"
        [crl] = parsed([await site.get(url)])
        assert serials(crl) == [bad.serial]
        scope = crl.extensions.get_extension_for_class(x509.IssuingDistributionPoint)
        assert scope.value.full_name == [x509.UniformResourceIdentifier(url)]

    async def test_many_readers_cost_one_signature(self, site: Site) -> None:
        bad = await site.svid()
        await site.broker.revoke(id=bad.serial)
        url = list_url(bad.leaf)
        answers = await asyncio.gather(*(fetched(url) for _ in range(30)))
        assert len({answer.content for answer in answers}) == 1

    async def test_a_revoked_authority_s_list_stays(self, site: Site) -> None:
        chain = await site.svid()
        [own] = await site.index()
        issuer = x509.load_pem_x509_certificate(site.broker.bundle_pem)
        await site.broker.revoke(authority=own["authority_id"], reason=2)
        der = await _until_listed(site, own["url"], chain.serial)
        assert signed_by(parsed([der])[0], issuer)
        assert "revoked" in chain.verdict(der)
        assert own["authority_id"] in {one["authority_id"] for one in await site.index()}
        assert len(await site.index()) == 2


async def test_without_a_public_address_there_are_no_parts(tmp_path: Path) -> None:
    settings = public_settings(
        tmp_path / "idb", ca={"key_manager": "memory"}, revocation={"public_url": None}
    )
    async with running(settings) as broker:
        node = await broker.join("web-1")
        entry = await broker.entry("/payments/api", "web-1")
        svid = (await node.issue(entry.id)).svid
        leaf = x509.load_der_x509_certificate(svid.cert_chain[0])
        for kind in (x509.CRLDistributionPoints, x509.AuthorityInformationAccess):
            with pytest.raises(x509.ExtensionNotFound):
                leaf.extensions.get_extension_for_class(kind)
        base = f"http://{broker.addresses.http_address}"
        [own] = (await fetched(f"{base}/crl")).json()["lists"]
        assert own["url"] == f"/crl/{own['authority_id']}.crl"
        assert "shards" not in own
        for url in (own["url"], own["delta_url"]):
            crl = x509.load_der_x509_crl((await fetched(base + url)).content)
            with pytest.raises(x509.ExtensionNotFound):
                crl.extensions.get_extension_for_class(x509.FreshestCRL)
        answer = await fetched(f"{base}/crl/{own['authority_id']}/5-of-64.crl")
        assert answer.status_code == 404


# --- without a broker -----------------------------------------------------------------------------


class Published:
    """Lists that fail, or are long."""

    points = DistributionPoints("http://idb.example.org", 64)

    def __init__(self, answer: ListDocument | BrokerError) -> None:
        self.answer = answer

    def full_lists(self) -> list[ListDocument]:
        return []

    async def document(
        self, authority_id: str, kind: ListKind, shard: Shard | None = None
    ) -> ListDocument:
        if isinstance(self.answer, BrokerError):
            raise self.answer
        return self.answer


@asynccontextmanager
async def served(lists: Published, clock: Clock | None = None) -> AsyncIterator[httpx.AsyncClient]:
    metrics = Metrics()
    app = build_app(
        readiness=Readiness({}, metrics),
        metrics=metrics,
        bundle=lambda: None,  # type: ignore[arg-type,return-value]
        routes=crl_routes(lists, clock=clock or SystemClock()),
    )
    listener = HttpListener("127.0.0.1:0", app)
    await listener.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://{listener.address}") as client:
            yield client
    finally:
        await listener.stop(timedelta(seconds=1))


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (AuthorityNotFound(), 404, None),
        (AuthorityUnavailable(retry_after=5.0), 503, "5"),
        (SigningBackendUnavailable(detail="INTERNALS"), 503, "1"),
    ],
)
async def test_what_cannot_be_had_now(
    error: BrokerError, status: int, retry_after: str | None
) -> None:
    async with served(Published(error)) as client:
        answer = await client.get("/crl/a.crl")
        assert answer.status_code == status
        assert answer.headers.get("retry-after") == retry_after
        assert answer.headers["cache-control"] == "no-store"
        assert "INTERNALS" not in json.dumps(answer.json())


@pytest.mark.parametrize("octets", [0, 1, 47, 48, 49, 48 * 1024, 48 * 1024 + 1, 3_000_000])
async def test_lists_of_any_length(octets: int) -> None:
    now = datetime.now(UTC)
    content = bytes(range(256)) * (octets // 256 + 1)
    document = ListDocument("a", ListKind.FULL, content[:octets], 1, now, now, now, 0)
    async with served(Published(document)) as client:
        assert (await client.get("/crl/a.crl")).content == content[:octets]
        text = await client.get("/crl/a.pem")
        assert text.headers["content-length"] == str(len(text.content))
        lines = text.content.splitlines()
        assert {len(line) for line in lines[1:-2]} <= {64}


NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


def document_of(der: bytes, number: int = 1, built_at: datetime = NOW) -> ListDocument:
    until = built_at + timedelta(hours=1)
    return ListDocument("a", ListKind.FULL, der, number, built_at, built_at, until, 0)


def http_date(moment: datetime) -> str:
    return format_datetime(moment, usegmt=True)


async def test_a_reader_may_ask_by_date() -> None:
    clock = SettableClock()
    lists = Published(document_of(b"first", built_at=NOW + timedelta(milliseconds=200)))
    second = timedelta(seconds=1)

    async with served(lists, clock) as client:

        async def asked(since: str, **headers: str) -> httpx.Response:
            return await client.get("/crl/a.crl", headers={"if-modified-since": since, **headers})

        # More lists may be made in this very second: no date tells them apart yet.
        clock.time = NOW + timedelta(milliseconds=300)
        early = await client.get("/crl/a.crl")
        assert "last-modified" not in early.headers
        assert (await asked(http_date(NOW))).status_code == 200
        lists.answer = document_of(b"second", 2, NOW + timedelta(milliseconds=700))
        clock.time = NOW + timedelta(milliseconds=900)
        # What came first has the date of this second too, by the `Date` header of its answer.
        assert (await asked(http_date(NOW))).content == b"second"

        clock.time = NOW + 30 * second
        assert (await asked(http_date(NOW))).content == b"second"
        date = (await client.get("/crl/a.crl")).headers["last-modified"]
        assert date == http_date(NOW + second)
        for since in (date, http_date(NOW + 20 * second)):
            known = await asked(since)
            assert (known.status_code, known.content) == (304, b"")
            assert known.headers["last-modified"] == date
        for since in (
            http_date(NOW + 31 * second),
            "yesterday",
            "",
            "Fri, 2 Jan 99999999999 1:1:1 GMT",
        ):
            assert (await asked(since)).status_code == 200, since
        # The entity tag says more than a date.
        assert (await asked(date, **{"if-none-match": '"1"'})).status_code == 200
        assert (await asked(http_date(NOW), **{"if-none-match": '"2"'})).status_code == 304
        lists.answer = document_of(b"third", 3, NOW + 29 * second)
        assert (await asked(date)).content == b"third"


@pytest.mark.parametrize("form", ["crl", "pem"])
async def test_slow_readers_share_a_long_list(form: str) -> None:
    """Each of them holds a piece of it and no more."""
    long, readers = 35_000_000, 40
    lists = Published(document_of(bytes(long)))
    async with served(lists) as client:
        url = client.base_url
        asking = f"GET /crl/a.{form} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            opened = []
            for _ in range(readers):
                reader = socket.create_connection((url.host, url.port))
                reader.sendall(asking)
                opened.append(reader)
            await asyncio.sleep(1.0)
            now, most = tracemalloc.get_traced_memory()
            assert [one.recv(12) for one in opened] == [b"HTTP/1.1 200"] * readers
        finally:
            tracemalloc.stop()
            for reader in opened:
                reader.close()
        print(f"{readers} readers: {now - before:,} octets, at most {most - before:,}")
        assert most - before < readers * 400_000 < long
        # They were not served the whole of it by the kernel either.
        assert now - before > readers * 40_000


async def test_former_lists_are_taken_from_those_who_read_them_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reader that waits at every list that is made must not keep them all in memory."""
    monkeypatch.setattr(crl_module, "MOST_READ_OCTETS", 1_000_000)
    read = ListsBeingRead()
    lists = [bytes([number]) * 400_000 for number in range(5)]
    slow = [read.pieces(der, pem=False) for der in lists]
    for number, reader in enumerate(slow):
        assert (await anext(reader))[0] == number
        assert read.octets <= 1_000_000
    got = [sum([len(piece) async for piece in reader]) + 48 * 1024 for reader in slow]
    assert got == [48 * 1024] * 3 + [400_000] * 2
    assert read.octets == 0
    # One that is longer than that is read all the same.
    assert sum([len(one) async for one in read.pieces(bytes(2_000_000), pem=False)]) == 2_000_000
    # Who breaks off lets go of it.
    broken = read.pieces(lists[0], pem=True)
    await anext(broken)
    assert read.octets == 400_000
    await broken.aclose()
    assert read.octets == 0


async def test_a_reader_whose_list_was_taken_away_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crl_module, "MOST_READ_OCTETS", 1)
    lists = Published(document_of(bytes(30_000_000)))
    async with served(lists) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            async with client.stream("GET", "/crl/a.crl") as answer:
                assert answer.status_code == 200
                lists.answer = document_of(b"the next one", 2)
                async with client.stream("GET", "/crl/a.crl") as other:
                    assert await other.aread() == b"the next one"
                async for _ in answer.aiter_raw():
                    pass
        assert (await client.get("/crl/a.crl")).content == b"the next one"
