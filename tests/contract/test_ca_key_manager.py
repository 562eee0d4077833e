"""The key managers that need nothing but this process, against the contract of all of them."""

from __future__ import annotations

import pytest

from identity_ca.backends.file import FileKeyManager
from identity_ca.backends.memory import MemoryKeyManager
from identity_ca.keys import KeyAlgorithm
from support.key_manager_contract import KeyManagerContract

ALL_KEYS = tuple(
    (purpose, algorithm)
    for purpose in ("x509", "jwt")
    for algorithm in (KeyAlgorithm.EC_P256, KeyAlgorithm.EC_P384, KeyAlgorithm.ED25519)
)


class TestMemoryKeyManager(KeyManagerContract):
    name = "memory"
    keys = ALL_KEYS

    @pytest.fixture
    def key_manager(self):
        return MemoryKeyManager()


class TestFileKeyManager(KeyManagerContract):
    name = "file"
    keys = ALL_KEYS

    @pytest.fixture
    def key_manager(self, tmp_path):
        return FileKeyManager(tmp_path / "keys")

    @pytest.fixture
    def reopened(self, tmp_path):
        return FileKeyManager(tmp_path / "keys")
