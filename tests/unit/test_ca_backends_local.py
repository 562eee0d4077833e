"""Keys in memory and in files: what the operating system is asked, and what is refused."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, x25519

from identity_ca.backends.file import FileKeyManager
from identity_ca.backends.memory import MemoryKeyManager
from identity_ca.errors import (
    BackendMisconfigured,
    BackendUnavailable,
    CAError,
    KeyNotFound,
)
from identity_ca.keys import KeyAlgorithm, spki_der
from support.ca_material import key_pem, signing_key, write_private

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes the owner of a file")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def manager(directory) -> FileKeyManager:
    return FileKeyManager(directory)


def only_file(directory: Path) -> Path:
    found = list(directory.iterdir())
    assert len(found) == 1
    return found[0]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- memory -----------------------------------------------------------------------------------


def test_memory_keys_are_of_one_object_and_gone_when_it_is_closed():
    manager = MemoryKeyManager()
    key = manager.create("x509", KeyAlgorithm.EC_P256)
    with pytest.raises(KeyNotFound):
        MemoryKeyManager().load(key.key_id)
    manager.close()
    with pytest.raises(KeyNotFound, match="no such signing key") as gone:
        manager.load(key.key_id)
    assert gone.value.hint


# --- files: what is written -------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o277])
def test_keys_are_private_whatever_the_umask_is(directory, umask):
    if umask == 0o277:
        directory.mkdir(mode=0o700)  # or nobody but root could write into it
    before = os.umask(umask)
    try:
        FileKeyManager(directory).create("x509", KeyAlgorithm.EC_P256)
    finally:
        os.umask(before)
    assert mode(only_file(directory)) == 0o600
    assert mode(directory) == 0o700


def test_a_key_file_is_pkcs8_pem_named_by_its_id(manager, directory):
    key = manager.create("jwt", KeyAlgorithm.EC_P256)
    path = only_file(directory)
    assert re.fullmatch(r"jwt-[0-9a-f]{28}\.pem", path.name)
    assert key.key_id == f"file:{path.stem}@1"
    pem = path.read_bytes()
    assert pem.startswith(b"-----BEGIN PRIVATE KEY-----")
    private_key = serialization.load_pem_private_key(pem, password=None)
    assert spki_der(private_key.public_key()) == spki_der(key.public_key)


def test_a_failed_write_leaves_nothing_behind(manager, directory, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("identity_ca.backends.private_file.os.fsync", full)
    with pytest.raises(BackendUnavailable) as failure:
        manager.create("x509", KeyAlgorithm.EC_P256)
    assert failure.value.retry_after is not None
    assert list(directory.iterdir()) == []


def test_a_key_is_on_disk_before_it_has_its_name(manager, directory, monkeypatch):
    """The order of a durable write: sync the content, rename, sync the directory."""
    steps: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor: int) -> None:
        kind = "directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "content"
        steps.append(f"sync {kind}")
        fsync(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        assert mode(path) == 0o600
        steps.append("rename")
        return rename(path, target)

    monkeypatch.setattr("identity_ca.backends.private_file.os.fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    manager.create("x509", KeyAlgorithm.EC_P256)
    assert steps == ["sync content", "rename", "sync directory"]


def test_a_leftover_of_a_crash_is_no_key(manager, directory):
    key = manager.create("x509", KeyAlgorithm.EC_P256)
    path = only_file(directory)
    path.rename(path.with_name(f".{path.name}.0123456789abcdef.tmp"))
    with pytest.raises(KeyNotFound):
        manager.load(key.key_id)


# --- files: what is refused -------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0o604, 0o640, 0o620, 0o602, 0o610, 0o666, 0o777])
def test_a_key_file_others_can_reach_is_refused(manager, directory, bits):
    key = manager.create("x509", KeyAlgorithm.EC_P256)
    only_file(directory).chmod(bits)
    with pytest.raises(BackendMisconfigured, match="other users") as refusal:
        manager.load(key.key_id)
    assert "chmod 0600" in refusal.value.hint
    assert mode(only_file(directory)) == bits


@pytest.mark.parametrize("bits", [0o755, 0o750, 0o701, 0o777])
def test_a_key_directory_others_can_reach_is_refused(manager, directory, bits):
    key = manager.create("x509", KeyAlgorithm.EC_P256)
    directory.chmod(bits)
    for use in (
        lambda: manager.load(key.key_id),
        lambda: manager.create("x509", KeyAlgorithm.EC_P256),
        manager.check,
    ):
        with pytest.raises(BackendMisconfigured, match="other users") as refusal:
            use()
        assert "chmod 0700" in refusal.value.hint


@as_root
@pytest.mark.parametrize("which", ["file", "directory"])
def test_another_users_file_or_directory_is_refused(manager, directory, which):
    key = manager.create("x509", KeyAlgorithm.EC_P256)
    os.chown(only_file(directory) if which == "file" else directory, 65534, -1)
    with pytest.raises(BackendMisconfigured, match="belongs to another user"):
        manager.load(key.key_id)


def test_a_symbolic_link_to_a_key_is_refused(manager, directory, tmp_path):
    key = manager.create("x509", KeyAlgorithm.EC_P256)
    path = only_file(directory)
    path.rename(tmp_path / "elsewhere.pem")
    path.symlink_to(tmp_path / "elsewhere.pem")
    with pytest.raises(BackendMisconfigured):
        manager.load(key.key_id)


def test_a_symbolic_link_to_a_directory_is_refused(directory, tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    directory.symlink_to(tmp_path / "real")
    manager = FileKeyManager(directory)
    with pytest.raises(BackendMisconfigured, match="symbolic link"):
        manager.create("x509", KeyAlgorithm.EC_P256)
    with pytest.raises(BackendMisconfigured):
        manager.check()


def test_a_fifo_is_refused_without_waiting_for_a_writer(manager, directory):
    key = manager.create("x509", KeyAlgorithm.EC_P256)
    path = only_file(directory)
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(BackendMisconfigured, match="regular file"):
        manager.load(key.key_id)


def other_key() -> bytes:
    return x25519.X25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def encrypted_key() -> bytes:
    return (
        signing_key()
        .as_private_key()
        .private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"hunter2"),
        )
    )


def weak_key() -> bytes:
    return ec.generate_private_key(ec.SECP256K1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


@pytest.mark.parametrize(
    "content",
    [
        lambda: b"",
        lambda: b"s3cr3t-material\n" * 4,
        lambda: key_pem(signing_key())[:-60],
        lambda: key_pem(signing_key()).replace(b"M", b"N", 3),
        lambda: b"\x00" * (64 * 1024 + 1),
        other_key,
        encrypted_key,
        weak_key,
    ],
    ids=["empty", "text", "cut", "damaged", "long", "x25519", "encrypted", "curve"],
)
def test_a_file_without_a_usable_key_is_refused_and_not_quoted(manager, directory, content):
    key = manager.create("x509", KeyAlgorithm.EC_P256)
    raw = content()
    write_private(only_file(directory), raw)
    with pytest.raises(BackendMisconfigured) as refusal:
        manager.load(key.key_id)
    told = f"{refusal.value} {refusal.value.hint} {refusal.value.__cause__}"
    for line in raw.decode("latin-1").splitlines():
        if len(line) > 8 and "-----" not in line:
            assert line not in told


def test_a_place_that_cannot_hold_keys_is_refused(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "no" / "parent"):
        manager = FileKeyManager(place)
        with pytest.raises(BackendMisconfigured) as refusal:
            manager.create("x509", KeyAlgorithm.EC_P256)
        assert refusal.value.hint or refusal.value.detail
        with pytest.raises(BackendMisconfigured):
            manager.check()


def test_a_failing_disk_is_unavailable_and_not_misconfigured(manager, directory, monkeypatch):
    key = manager.create("x509", KeyAlgorithm.EC_P256)

    def failing(*_: object) -> os.stat_result:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr("identity_ca.backends.file.os.lstat", failing)
    for use in (lambda: manager.load(key.key_id), manager.check):
        with pytest.raises(BackendUnavailable):
            use()


def test_no_key_material_in_any_repr(manager, directory):
    key = manager.create("x509", KeyAlgorithm.EC_P256)
    secret = key.as_private_key().private_numbers().private_value
    for shown in (repr(key), repr(manager), str(vars(manager))):
        assert str(secret) not in shown
        assert f"{secret:x}" not in shown


def test_ids_never_reach_outside_the_directory(manager, directory, tmp_path):
    manager.create("x509", KeyAlgorithm.EC_P256)
    write_private(tmp_path / "outside.pem", key_pem(signing_key()))
    for key_id in ("file:../outside@1", f"file:{tmp_path}/outside@1", "file:..%2foutside@1"):
        with pytest.raises(KeyNotFound) as refusal:
            manager.load(key_id)
        assert isinstance(refusal.value, CAError)
