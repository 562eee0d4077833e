"""OpenBao's PKI engine, with the broker's own policy, against the contract of upstreams."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from identity_ca.backends.vault.pki import VaultPkiUpstream
from identity_ca.backends.vault.session import VaultSession, VaultSettings
from identity_ca.errors import UpstreamRejected
from support.openbao import VaultSite, make_site
from support.upstream_contract import UpstreamContract

pytestmark = pytest.mark.openbao


@pytest.fixture(scope="module")
def site(openbao, openbao_admin, tmp_path_factory) -> VaultSite:
    return make_site(openbao, openbao_admin, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def session(site) -> Iterator[VaultSession]:
    with VaultSession(VaultSettings(address=site.address), site.auth()) as session:
        yield session


class TestVaultPkiUpstream(UpstreamContract):
    name = "vault_pki"
    refusals = (UpstreamRejected,)

    @pytest.fixture
    def upstream(self, session, site) -> VaultPkiUpstream:
        return VaultPkiUpstream(session, mount=site.layout.pki_mount, issuer_ref=site.layout.issuer)
