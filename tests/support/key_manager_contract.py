"""What every key manager does; a backend's test module subclasses `KeyManagerContract`.

class TestTransit(KeyManagerContract):
    keys = (("x509", KeyAlgorithm.EC_P256), ("jwt", KeyAlgorithm.EC_P256))

    @pytest.fixture
    def key_manager(self, ...) -> Iterator[KeyManager]: ...

    @pytest.fixture
    def reopened(self, ...) -> KeyManager: ...      # the same storage, a new object
"""

from __future__ import annotations

import re
from typing import ClassVar

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import NameOID

from identity_ca.errors import BackendMisconfigured, KeyNotFound
from identity_ca.keys import (
    KeyAlgorithm,
    KeyManager,
    SigningKey,
    algorithm_of,
    signature_hash,
    spki_der,
    verify_signature,
)


class KeyManagerContract:
    """Subclass it, name the class `Test…`, provide `key_manager` and, if durable, `reopened`."""

    name: ClassVar[str]
    """What `KeyManager.name` is, and how its key ids begin."""

    keys: ClassVar[tuple[tuple[str, KeyAlgorithm], ...]] = (
        ("x509", KeyAlgorithm.EC_P256),
        ("x509", KeyAlgorithm.EC_P384),
        ("jwt", KeyAlgorithm.EC_P256),
    )
    """Which keys can be made; every test is run with one of each."""

    remote: ClassVar[bool] = False

    @pytest.fixture
    def key_manager(self) -> KeyManager:
        raise NotImplementedError

    @pytest.fixture
    def reopened(self) -> KeyManager:
        """Another object on the same storage; where there is none, leave this as it is."""
        pytest.skip("keeps nothing beyond its own life")

    @pytest.fixture
    def made(self, key_manager: KeyManager) -> list[tuple[SigningKey, KeyAlgorithm]]:
        return [(key_manager.create(p, algorithm), algorithm) for p, algorithm in self.keys]

    def test_the_name_begins_every_key_id(self, key_manager, made):
        assert key_manager.name == self.name
        for key, _ in made:
            assert re.fullmatch(rf"{self.name}:[A-Za-z0-9._-]+@[1-9][0-9]*", key.key_id)

    def test_a_key_is_of_the_algorithm_asked_for(self, made):
        for key, algorithm in made:
            assert key.algorithm is algorithm
            assert algorithm_of(key.public_key) is algorithm
            assert key.remote is self.remote

    def test_two_keys_are_never_the_same(self, key_manager):
        purpose, algorithm = self.keys[0]
        first, second = (key_manager.create(purpose, algorithm) for _ in range(2))
        assert first.key_id != second.key_id
        assert spki_der(first.public_key) != spki_der(second.public_key)

    def test_a_signature_verifies_with_the_public_key(self, made):
        for key, _ in made:
            verify_signature(key.public_key, key.sign(b"to be signed"), b"to be signed")

    def test_a_signature_is_for_its_message_only(self, made):
        for key, _ in made:
            with pytest.raises(InvalidSignature):
                verify_signature(key.public_key, key.sign(b"this"), b"that")

    def test_an_empty_and_a_long_message_can_be_signed(self, made):
        key, _ = made[0]
        for message in (b"", b"m" * 100_000):
            verify_signature(key.public_key, key.sign(message), message)

    def test_many_signatures_come_in_the_order_of_the_messages(self, made):
        messages = [f"message {number}".encode() for number in range(7)]
        for key, _ in made:
            signatures = key.sign_many(messages)
            assert len(signatures) == len(messages)
            for signature, message in zip(signatures, messages, strict=True):
                verify_signature(key.public_key, signature, message)

    def test_no_messages_give_no_signatures(self, made):
        assert made[0][0].sign_many([]) == []

    def test_the_builders_can_sign_with_it(self, made):
        for key, algorithm in made:
            request = (
                x509.CertificateSigningRequestBuilder()
                .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")]))
                .sign(key.as_private_key(), signature_hash(algorithm))
            )
            assert request.is_signature_valid
            assert spki_der(request.public_key()) == spki_der(key.public_key)

    def test_a_key_can_be_loaded_by_its_id(self, key_manager, made):
        for key, _ in made:
            self._same_key(key_manager.load(key.key_id), key)

    def test_an_older_key_stays_itself(self, key_manager):
        purpose, algorithm = self.keys[0]
        older = key_manager.create(purpose, algorithm)
        key_manager.create(purpose, algorithm)
        self._same_key(key_manager.load(older.key_id), older)
        verify_signature(older.public_key, older.sign(b"still mine"), b"still mine")

    def test_keys_survive_a_restart(self, made, reopened):
        for key, _ in made:
            self._same_key(reopened.load(key.key_id), key)

    @pytest.mark.parametrize(
        "key_id",
        [
            "",
            "no such key",
            "{name}:",
            "{name}:x509@",
            "{name}:x509@0",
            "{name}:x509@-1",
            "{name}:../../etc/passwd@1",
            "{name}:x509-0000000000000000000000000000@1",
            "{name}:x509\x00@1",
            "{name}:x509@1\n",
            "other:x509@1",
            "{name}:" + "a" * 5000 + "@1",
        ],
    )
    def test_an_unknown_id_is_not_found(self, key_manager, key_id):
        with pytest.raises(KeyNotFound) as refused:
            key_manager.load(key_id.replace("{name}", self.name))
        assert len(refused.value.message) < 200

    def test_another_purpose_is_refused(self, key_manager):
        with pytest.raises(BackendMisconfigured):
            key_manager.create("tls", self.keys[0][1])

    def test_check_passes_before_and_after_the_first_key(self, key_manager):
        key_manager.check()
        key_manager.create(*self.keys[0])
        key_manager.check()

    def test_closing_twice_is_harmless(self, key_manager):
        key_manager.close()
        key_manager.close()

    def _same_key(self, found: SigningKey, expected: SigningKey) -> None:
        assert found.key_id == expected.key_id
        assert found.algorithm is expected.algorithm
        assert spki_der(found.public_key) == spki_der(expected.public_key)
        verify_signature(expected.public_key, found.sign(b"again"), b"again")
