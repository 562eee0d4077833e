"""Signing keys that live as long as the process: for tests and throw-away set-ups.

- Nothing is written anywhere. A key of another process or of an earlier run is `KeyNotFound`.
"""

from __future__ import annotations

import secrets
import threading
from typing import Final

from identity_ca.errors import BackendMisconfigured, KeyNotFound
from identity_ca.keys import KeyAlgorithm, LocalSigningKey, SigningKey, generate_private_key

__all__ = ["MemoryKeyManager"]

_PURPOSES: Final = ("x509", "jwt")


class MemoryKeyManager:
    """A `KeyManager` without storage. Safe to use from several threads."""

    name: Final = "memory"

    def __init__(self) -> None:
        self._keys: dict[str, LocalSigningKey] = {}
        self._lock = threading.Lock()

    def create(self, purpose: str, algorithm: KeyAlgorithm) -> SigningKey:
        """A new key.

        Raises:
            BackendMisconfigured: the purpose is neither `x509` nor `jwt`.
        """
        if purpose not in _PURPOSES:
            raise BackendMisconfigured("a signing key is for x509 or for jwt")
        key_id = f"memory:{purpose}-{secrets.token_hex(8)}@1"
        key = LocalSigningKey(key_id, generate_private_key(algorithm))
        with self._lock:
            self._keys[key_id] = key
        return key

    def load(self, key_id: str) -> SigningKey:
        """The key of that id.

        Raises:
            KeyNotFound: not made by this object, or it was closed.
        """
        with self._lock:
            key = self._keys.get(key_id)
        if key is None:
            raise KeyNotFound(
                "this process holds no such signing key",
                detail=key_id,
                hint="keys in memory end with the process; use the file or transit key manager",
            )
        return key

    def check(self) -> None:
        """Memory is always there."""

    def close(self) -> None:
        """Forget all keys."""
        with self._lock:
            self._keys.clear()
