"""Transit on a real OpenBao, with the broker's own policy, against the contract of key managers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from identity_ca.backends.vault.auth import TokenAuth
from identity_ca.backends.vault.session import VaultSession, VaultSettings
from identity_ca.backends.vault.transit import TransitKeyManager
from identity_ca.keys import KeyAlgorithm
from support.key_manager_contract import KeyManagerContract
from support.openbao import VaultSite, make_site

pytestmark = pytest.mark.openbao


@pytest.fixture(scope="module")
def site(openbao, openbao_admin, tmp_path_factory) -> VaultSite:
    return make_site(openbao, openbao_admin, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def session(site) -> Iterator[VaultSession]:
    with VaultSession(VaultSettings(address=site.address), site.auth()) as session:
        yield session


class TestTransitKeyManager(KeyManagerContract):
    name = "transit"
    remote = True
    keys = (("x509", KeyAlgorithm.EC_P256), ("jwt", KeyAlgorithm.EC_P256))

    @pytest.fixture
    def key_manager(self, session, site) -> TransitKeyManager:
        return TransitKeyManager(session, mount=site.layout.transit_mount)

    @pytest.fixture
    def reopened(self, session, site) -> TransitKeyManager:
        return TransitKeyManager(session, mount=site.layout.transit_mount)


@pytest.fixture(scope="module")
def root_session(openbao, site) -> Iterator[VaultSession]:
    settings = VaultSettings(address=openbao.address)
    with VaultSession(settings, TokenAuth(openbao.root_token_file)) as session:
        for kind in ("ed25519", "ecdsa-p384", "rsa-2048"):
            session.post(f"{site.layout.transit_mount}/keys/other-{kind}", {"type": kind})
        yield session


class TestTransitKeyManagerOfOtherAlgorithms(KeyManagerContract):
    name = "transit"
    remote = True
    keys = (
        ("x509", KeyAlgorithm.ED25519),
        ("jwt", KeyAlgorithm.EC_P384),
        ("rsa", KeyAlgorithm.RSA_2048),
    )

    @pytest.fixture
    def key_manager(self, root_session, site) -> TransitKeyManager:
        return TransitKeyManager(
            root_session,
            mount=site.layout.transit_mount,
            names={"x509": "other-ed25519", "jwt": "other-ecdsa-p384", "rsa": "other-rsa-2048"},
        )

    @pytest.fixture
    def reopened(self, key_manager: TransitKeyManager) -> TransitKeyManager:
        return key_manager
