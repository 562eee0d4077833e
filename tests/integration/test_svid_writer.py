"""The files of an SVID are written where they were meant to go, whoever tampers with the way."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from identity_broker.cli.errors import DirectoryExposed, FileUnusable
from identity_broker.cli.svid_writer import SvidFile, SvidFolder

ROOT = os.geteuid() == 0
OTHER = 4001
as_root = pytest.mark.skipif(not ROOT, reason="only root can be another user")
FILES = {"key.pem": SvidFile(b"key", secret=True), "svid.pem": SvidFile(b"chain")}


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write(directory: Path) -> None:
    with SvidFolder(directory) as folder:
        folder.replace(FILES)
        folder.discard_old()


def refusal(directory: Path) -> DirectoryExposed:
    before = set(directory.iterdir())
    with pytest.raises(DirectoryExposed) as refused:
        write(directory)
    assert set(directory.iterdir()) == before
    assert refused.value.hint
    return refused.value


def test_directories_are_made_and_are_ours_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = os.umask(0)
    try:
        write(tmp_path / "new" / "deep")
    finally:
        os.umask(old)
    out = tmp_path / "new" / "deep"
    assert mode_of(out) == 0o700
    assert (mode_of(out / "key.pem"), mode_of(out / "svid.pem")) == (0o600, 0o644)
    assert mode_of(out / ".current") == 0o755
    assert (out / "key.pem").read_bytes() == b"key"

    monkeypatch.chdir(out)
    for relative in (Path(), Path("a/../b"), Path("../deep")):
        (out / "a").mkdir(exist_ok=True)
        write(relative)
    assert (out / "b" / "key.pem").read_bytes() == b"key"
    assert len(list(out.glob(".generation-*"))) == 1


def test_what_was_there_before_is_replaced_and_what_is_another_s_stays(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("a file")
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "far").symlink_to("elsewhere")
    (tmp_path / ".key.pem.new").symlink_to("/nowhere")
    with SvidFolder(tmp_path) as folder:
        folder.replace(FILES | {"crl.pem": SvidFile(b"list")})
        assert (tmp_path / "crl.pem").read_bytes() == b"list"
        folder.replace(FILES)
        folder.discard_old()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == [
        "far",
        "key.pem",
        "notes",
        "svid.pem",
    ]
    assert (tmp_path / "key.pem").read_bytes() == b"key"


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o1777, 0o2775])
def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(mode)
    assert "other users may write to" in refusal(out).public
    # A directory of its own below it will do.
    write(out / "mine")
    assert (out / "mine" / "key.pem").read_bytes() == b"key"


def test_a_directory_that_is_opened_to_others_later_is_refused_then(tmp_path: Path) -> None:
    with SvidFolder(tmp_path) as folder:
        folder.replace(FILES)
        tmp_path.chmod(0o777)
        with pytest.raises(DirectoryExposed):
            folder.replace(FILES)
        tmp_path.chmod(0o700)
        folder.replace(FILES)


@as_root
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    os.chown(out, OTHER, 0)
    assert f"another user, uid {OTHER}" in refusal(out).public


def test_links_of_our_own_are_followed(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "absolute").symlink_to(real)
    (tmp_path / "relative").symlink_to("./absolute/../real")
    write(tmp_path / "relative" / "below")
    write(tmp_path / "relative")
    assert (real / "below" / "key.pem").read_bytes() == (real / "key.pem").read_bytes() == b"key"

    (tmp_path / "round").symlink_to("round")
    with pytest.raises(FileUnusable, match="symbolic links"):
        write(tmp_path / "round")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FileUnusable, match="not a directory"):
            write(path)


@as_root
@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_link_of_another_user_is_not_followed(tmp_path: Path, below: str) -> None:
    target = tmp_path / "target"
    target.mkdir()
    link = tmp_path / "link"
    link.symlink_to(target)
    os.chown(link, OTHER, OTHER, follow_symlinks=False)
    with pytest.raises(DirectoryExposed, match="symbolic link of another user"):
        write(link / below)
    assert list(target.iterdir()) == []


def test_no_descriptor_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide").chmod(0o777)
    write(tmp_path / "link" / "out")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        write(tmp_path / "link" / "out")
        for bad in ("wide", "link/wide"):
            with pytest.raises(DirectoryExposed):
                write(tmp_path / bad)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


_SWAP = """
import os, sys
where, secret = sys.argv[1:]
os.chdir(where)
os.setgroups([]); os.setgid(4001); os.setuid(4001)
print("up", flush=True)
while True:
    try:
        for name in os.listdir("."):
            if name.startswith(".generation-") and not os.path.islink(name):
                os.rename(name, "x" + name)
                os.symlink(secret, name)
    except OSError:
        pass
"""


@as_root
def test_a_generation_that_is_swapped_for_a_link_leads_nowhere(tmp_path: Path) -> None:
    """As if the check of the directory were not there: the descriptors alone must do."""

    class Unchecked(SvidFolder):
        def _check(self) -> None:
            """Let another user's directory pass."""

    out, secret = tmp_path / "out", tmp_path / "secret"
    out.mkdir()
    secret.mkdir(mode=0o700)
    os.chown(out, OTHER, OTHER)
    attacker = subprocess.Popen(
        [sys.executable, "-c", _SWAP, str(out), str(secret)], stdout=subprocess.PIPE
    )
    try:
        assert attacker.stdout is not None
        assert attacker.stdout.readline() == b"up\n"
        swapped = 0
        until = time.monotonic() + 20
        for turn in range(200):
            try:
                with Unchecked(out) as folder:
                    folder.replace({f"k{turn}.pem": SvidFile(b"K" * 1000, secret=True)})
            except FileUnusable:
                swapped += 1
            assert mode_of(secret) == 0o700
            assert list(secret.iterdir()) == []
            if swapped >= 20 or time.monotonic() > until:
                break
        assert swapped  # it has been tried
    finally:
        attacker.kill()
        attacker.wait()
        if attacker.stdout is not None:
            attacker.stdout.close()
