"""Revocation lists over HTTP: what is in them, how fresh they are, what OpenSSL makes of them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import AuthorityInformationAccessOID

from identity_broker.errors import (
    AuthorityNotFound,
    AuthorityUnavailable,
    BrokerError,
    SigningBackendUnavailable,
)
from identity_broker.lifecycle.crl.document import ListDocument, ListKind
from identity_broker.server.http.app import build_app
from identity_broker.server.http.crl import crl_routes
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

    async def test_published_within_a_quarter_of_a_second(self, site: Site) -> None:
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
        assert max(seconds.values()) < 0.25

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
                assert first.headers["last-modified"].endswith("GMT")
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


async def served(lists: Published) -> AsyncIterator[httpx.AsyncClient]:
    metrics = Metrics()
    app = build_app(
        readiness=Readiness({}, metrics),
        metrics=metrics,
        bundle=lambda: None,  # type: ignore[arg-type,return-value]
        routes=crl_routes(lists),
    )
    listener = HttpListener("127.0.0.1:0", app)
    await listener.start()
    async with httpx.AsyncClient(base_url=f"http://{listener.address}") as client:
        yield client
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
    async for client in served(Published(error)):
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
    async for client in served(Published(document)):
        assert (await client.get("/crl/a.crl")).content == content[:octets]
        text = await client.get("/crl/a.pem")
        assert text.headers["content-length"] == str(len(text.content))
        lines = text.content.splitlines()
        assert {len(line) for line in lines[1:-2]} <= {64}
