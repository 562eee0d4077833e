"""A FUSE file system of an unprivileged user, whose program runs and is then never described again.

Run as a program, in a user and a mount namespace of its own: `hung_fuse.py DEVICE PROGRAM FOLDER`.
It serves a copy of PROGRAM, puts an overlay over it (which asks FUSE in its owner's name, so that
root may reach it, too), runs it from there, and prints its pid. Then no GETATTR is answered.
"""

import ctypes
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

LOOKUP, GETATTR, OPEN, READ, STATFS, RELEASE = 1, 3, 14, 15, 17, 18
FORGET, FLUSH, INIT, OPENDIR, RELEASEDIR, BATCH_FORGET = 2, 25, 26, 27, 29, 42
ENOENT, ENOSYS = 2, 38


def attributes(node: int, size: int) -> bytes:
    mode = 0o40755 if node == 1 else 0o100755
    return struct.pack("<6Q10I", node, size, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


class HungFs:
    """Serves one file, "prog"."""

    def __init__(self, device: int, content: bytes) -> None:
        self._device = device
        self._content = content
        self.hangs = threading.Event()

    def serve(self) -> None:
        try:
            self._serve()
        finally:
            os._exit(1)  # else whoever asks waits for ever, we ourselves among them

    def _serve(self) -> None:
        while True:
            request = os.read(self._device, 1 << 20)
            _, kind, unique, node = struct.unpack_from("<IIQQ", request)
            if kind in {FORGET, BATCH_FORGET} or (kind == GETATTR and self.hangs.is_set()):
                continue
            error, body = self._answer(kind, node, request[40:])
            os.write(self._device, struct.pack("<IiQ", 16 + len(body), -error, unique) + body)

    def _answer(self, kind: int, node: int, body: bytes) -> tuple[int, bytes]:
        size = len(self._content)
        if kind == INIT:
            return 0, struct.pack("<IIIIHHIIHHI7I", 7, 31, 65536, 0, 12, 10, 65536, 1, *[0] * 10)
        if kind == LOOKUP and body[:-1] == b"prog":
            return 0, struct.pack("<4QII", 2, 0, 0, 0, 0, 0) + attributes(2, size)
        if kind == LOOKUP:
            return ENOENT, b""
        if kind == GETATTR:
            return 0, struct.pack("<QII", 0, 0, 0) + attributes(node, size)
        if kind in {OPEN, OPENDIR}:
            return 0, struct.pack("<QII", 1, 0, 0)
        if kind == READ:
            _, offset, length = struct.unpack_from("<QQI", body)
            return 0, self._content[offset : offset + length]
        if kind == STATFS:
            return 0, struct.pack("<5Q10I", 1, 1, 1, 1, 1, 4096, 255, 4096, *[0] * 7)
        return (0, b"") if kind in {FLUSH, RELEASE, RELEASEDIR} else (ENOSYS, b"")


def mount(source: str, target: str, kind: str, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    words = [word.encode() for word in (source, target, kind)]
    if libc.mount(*words, 0, options.encode()):
        number = ctypes.get_errno()
        sys.exit(f"mount {kind}: {os.strerror(number)}")


def main(device: str, program: str, folder: str) -> None:
    for name in ("fuse", "empty", "overlay"):
        Path(folder, name).mkdir()
    descriptor = os.open(device, os.O_RDWR)
    served = HungFs(descriptor, Path(program).read_bytes())
    options = f"fd={descriptor},rootmode=40000,user_id=0,group_id=0"
    mount("hung", f"{folder}/fuse", "fuse", options)
    threading.Thread(target=served.serve, daemon=True).start()
    lower = f"lowerdir={folder}/fuse:{folder}/empty"
    mount("overlay", f"{folder}/overlay", "overlay", lower)
    child = subprocess.Popen(
        [f"{folder}/overlay/prog", "60"],
        preexec_fn=lambda: None,  # noqa: PLW1509  # no vfork: it holds the GIL, and we must serve
    )
    time.sleep(0.5)  # It reads what it needs of itself.
    served.hangs.set()
    print(child.pid if child.poll() is None else "it has ended", flush=True)
    sys.stdin.read()
    os.kill(child.pid, 9)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
