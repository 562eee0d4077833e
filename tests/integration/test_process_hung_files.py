"""A caller whose program lies on a file system that it answers for itself (FUSE)."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.processes import unshare

SLEEP = Path("/bin/sleep").resolve()
SERVER = Path(__file__).parents[1] / "support" / "hung_fuse.py"
UID = 4001

LOOK = """
import asyncio, sys, time
from contextlib import closing
from identity_broker.attestors.workload.attestation import Attestation
from identity_broker.attestors.workload.plugins import build_attestors
from identity_broker.localpeer.process import LiveProcess

async def main():
    attestation = Attestation(build_attestors("unix", {}), 5)
    with closing(LiveProcess.of_pid(int(sys.argv[1]))) as process:
        for _ in range(3):
            process.check()
        found = await attestation.attest(
            process, {"unix": frozenset({"uid", "path", "sha256"})}
        )
    print(sorted(map(str, found.selectors)), found.problems)

asyncio.run(main())
"""


@contextmanager
def hung() -> Iterator[int]:
    """The pid of an unprivileged user's process whose program is never described again."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a device that another user may open")
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None or not Path("/dev/fuse").exists():
        pytest.skip("there is no FUSE here, or no Python that every user may run")
    command = unshare("-Urm")
    folder = Path(tempfile.mkdtemp(prefix="idb-fuse-"))
    try:
        os.mknod(folder / "device", stat.S_IFCHR | 0o666, Path("/dev/fuse").stat().st_rdev)
        (folder / "device").chmod(0o666)
        shutil.copy(SERVER, folder / "server.py")
        os.chown(folder, UID, UID)
        server = subprocess.Popen(
            [*command, python, "-I", "server.py", "device", SLEEP, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            user=UID,
            group=UID,
            extra_groups=[],
            text=True,
        )
        try:
            assert server.stdout is not None
            assert server.stderr is not None
            pid = server.stdout.readline().strip()
            if not pid.isdigit():
                pytest.skip(f"no FUSE below an overlay here: {pid or server.stderr.read()}")
            yield int(pid)
        finally:
            server.communicate(timeout=20)
    finally:
        shutil.rmtree(folder)


def test_a_file_system_that_never_answers_stops_nobody() -> None:
    """In processes of their own: whoever waits for the answer cannot even be killed."""
    looking: list[subprocess.Popen[str]] = []

    def start(*command: str) -> subprocess.Popen[str]:
        looking.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return looking[-1]

    try:
        with hung() as pid:
            naive = start("stat", "-L", f"/proc/{pid}/exe")
            with pytest.raises(subprocess.TimeoutExpired):  # or all of this shows nothing
                naive.communicate(timeout=1)
            found, _ = start(sys.executable, "-c", LOOK, str(pid)).communicate(timeout=30)
            assert found == f"['unix:gid:{UID}', 'unix:uid:{UID}'] ()\n"
    finally:
        for process in looking:
            process.kill()
            process.communicate(timeout=20)
