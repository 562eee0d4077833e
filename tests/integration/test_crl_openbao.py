"""OpenBao's certificate login with our revocation lists, and its own list as our upstream's."""

from __future__ import annotations

import asyncio
import http.client
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import hvac
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from identity_broker.dev.openbao import EmbeddedOpenBao
from identity_ca.backends.vault.pki import VaultPkiUpstream
from identity_ca.errors import UpstreamRejected
from identity_ca.upstream import verify_upstream_list
from support.line import AttestedClient, RunningBroker, csr_for, key_pem, new_key, running
from support.lists import fetched, parsed, public_settings, serials
from support.openbao import Fault, FaultProxy, OpenSession, TlsFiles, VaultSite

pytestmark = pytest.mark.openbao


@dataclass(frozen=True)
class Login:
    """A workload's SVID and key, for OpenBao's auth/cert."""

    serial: str
    folder: Path
    openbao: EmbeddedOpenBao
    server: TlsFiles
    mount: str

    @classmethod
    def of(cls, svid: Any, key: ec.EllipticCurvePrivateKey, folder: Path, *rest: Any) -> Login:
        folder.mkdir()
        chain = [x509.load_der_x509_certificate(der) for der in svid.cert_chain]
        (folder / "chain.pem").write_bytes(
            b"".join(one.public_bytes(Encoding.PEM) for one in chain)
        )
        (folder / "key.pem").write_bytes(key_pem(key))
        return cls(svid.serial, folder, *rest)

    async def answer(self) -> tuple[int, dict[str, Any]]:
        """What OpenBao says to the login."""
        return await asyncio.to_thread(self._ask)

    def _ask(self) -> tuple[int, dict[str, Any]]:
        context = ssl.create_default_context(cafile=str(self.server.ca))
        context.load_cert_chain(self.folder / "chain.pem", self.folder / "key.pem")
        host = self.openbao.tls_address.removeprefix("https://")
        connection = http.client.HTTPSConnection(host, context=context, timeout=10)
        try:
            connection.request("POST", f"/v1/auth/{self.mount}/login", body="{}")
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[RunningBroker]:
    settings = public_settings(tmp_path / "idb", ca={"key_manager": "memory"})
    async with running(settings) as one:
        yield one


@pytest.fixture
async def node(broker: RunningBroker) -> AttestedClient:
    return await broker.join("web-1")


@pytest.mark.parametrize("by", ["upload", "address"])
async def test_openbao_refuses_who_was_revoked(
    broker: RunningBroker,
    node: AttestedClient,
    openbao: EmbeddedOpenBao,
    openbao_admin: hvac.Client,
    openbao_tls: TlsFiles,
    tmp_path: Path,
    by: str,
) -> None:
    """The list is given to it, or it fetches the list itself."""
    mount = f"cert-{by}"
    # OpenBao names whoever logs in by the common name: the entry's first DNS name.
    entry = await broker.entry("/payments/api", "web-1", dns_names=["api.payments.internal"])
    base = broker.settings.revocation.public_url
    [own] = (await fetched(f"{base}/crl")).json()["lists"]

    async def tell() -> None:
        path = f"auth/{mount}/crls/idb"
        if by == "address":
            await asyncio.to_thread(openbao_admin.write_data, path, data={"url": own["url"]})
        else:
            pem = (await fetched(own["url"].removesuffix("crl") + "pem")).text
            await asyncio.to_thread(openbao_admin.write_data, path, data={"crl": pem})

    openbao_admin.sys.enable_auth_method("cert", path=mount)
    try:
        openbao_admin.write_data(
            f"auth/{mount}/certs/payments",
            data={
                "certificate": broker.bundle_pem.decode(),
                "allowed_uri_sans": "spiffe://example.org/payments/*",
            },
        )
        logins = []
        for name in ("good", "bad"):
            key = new_key()
            svid = (await node.issue(entry.id, csr_for(key))).svid
            rest = (openbao, openbao_tls, mount)
            logins.append(Login.of(svid, key, tmp_path / name, *rest))
        good, bad = logins
        await tell()
        for login in logins:
            status, answer = await login.answer()
            assert status == 200, answer
        await broker.revoke(id=bad.serial)
        async with asyncio.timeout(10):
            while bad.serial not in serials(parsed([(await fetched(own["url"])).content])[0]):
                await asyncio.sleep(0.01)
        await tell()
        status, answer = await bad.answer()
        assert status in (400, 403), answer
        status, answer = await good.answer()
        assert status == 200, answer
        assert answer["auth"]["metadata"]["common_name"] == "api.payments.internal"
    finally:
        openbao_admin.sys.disable_auth_method(path=mount)


# --- OpenBao's own list ---------------------------------------------------------------------------


def upstream(site: VaultSite, open_session: OpenSession, **options: Any) -> VaultPkiUpstream:
    session = open_session(auth=site.auth(), **options)
    return VaultPkiUpstream(session, mount=site.layout.pki_mount, issuer_ref=site.layout.issuer)


def lists_of(one: VaultPkiUpstream) -> tuple[bytes, ...]:
    now = datetime.now(UTC)
    return one.revocation_lists(number=1, this_update=now, next_update=now + timedelta(hours=1))


def test_the_mount_s_list_with_the_broker_s_own_login(
    vault_site: VaultSite, open_session: OpenSession
) -> None:
    [der] = lists_of(upstream(vault_site, open_session))
    pem = vault_site.admin.read(f"{vault_site.layout.pki_mount}/issuer/default/json")["data"]
    root = x509.load_pem_x509_certificate(pem["certificate"].encode())
    found = verify_upstream_list(der, [root])
    assert found.entries == 0
    assert found.next_update > datetime.now(UTC)
    key_id = root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    assert found.authority_id == key_id.hex()
    with pytest.raises(UpstreamRejected, match="no authority above ours"):
        verify_upstream_list(der, [])
    with pytest.raises(UpstreamRejected, match="cannot be read"):
        verify_upstream_list(der[:-5], [root])


@pytest.mark.parametrize("body", ["{}", '{"data": {"crl": 5}}', '{"data": {"crl": "x"}}'])
def test_an_answer_without_a_list(
    vault_site: VaultSite, open_session: OpenSession, fault_proxy: FaultProxy, body: str
) -> None:
    one = upstream(vault_site, open_session, address=fault_proxy.address)
    fault_proxy.inject(Fault(match="/crl", status=200, body=body.encode()))
    with pytest.raises(UpstreamRejected, match="revocation list"):
        lists_of(one)
