"""A workload in a process of its own: workload_probe.py UID SOCKET ACT.

Without our code but for the messages of the agent's own API. It becomes the user UID first: the
interpreter may lie where only its owner can start it.

    x509      FetchX509SVID: a line for every message, its SPIFFE IDs; a line for its end
    exec      as x509, but on a line of input it becomes another program, with the connection open
    heir      as x509, and a child of it inherits the connection; a line with the child's pid
    flood N   connects N times and keeps what stays open; a line with how many that are
    explain N asks the agent's admin socket about process N; a line with what it is told
    deaf N    opens N streams of one connection and never reads a byte of the answers
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

HEADER = (("workload.spiffe.io", "true"),)
FETCH = "/SpiffeWorkloadAPI/FetchX509SVID"


def say(**told: object) -> None:
    print(json.dumps(told), flush=True)


def become(uid: int) -> None:
    if uid != os.getuid():
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)


def connections() -> list[int]:
    """Descriptors of this process's sockets, made inheritable."""
    found = []
    for each in Path("/proc/self/fd").iterdir():
        try:
            if str(each.readlink()).startswith("socket:"):
                os.set_inheritable(int(each.name), True)
                found.append(int(each.name))
        except OSError:
            continue
    return found


def x509(uid: int, path: str) -> None:
    import grpc

    from identity_client._wire.workload import X509SVIDResponse

    become(uid)
    # Like any client that lives longer than a moment: it tries again.
    options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]
    with grpc.insecure_channel(f"unix:{path}", options) as channel:
        call: Any = channel.unary_stream(FETCH, None, X509SVIDResponse.FromString)
        try:
            for message in call(b"", metadata=HEADER, wait_for_ready=True):
                say(ids=[each.spiffe_id for each in message.svids])
            say(end="OK")
        except grpc.RpcError as error:
            say(end=error.code().name)


def explain(uid: int, path: str, pid: str) -> None:
    import grpc

    from identity_api.agent.v1 import agent_pb2, agent_pb2_grpc

    become(uid)
    with grpc.insecure_channel(f"unix:{path}") as channel:
        stub: Any = agent_pb2_grpc.AgentStub(channel)
        try:
            answer = stub.ExplainProcess(agent_pb2.ExplainProcessRequest(pid=int(pid)))
            say(
                selectors=list(answer.selectors),
                entries={each.entry_id: list(each.missing) for each in answer.entries},
                hidden=answer.hidden,
            )
        except grpc.RpcError as error:
            say(end=error.code().name, text=error.details())


def becoming_another(uid: int, path: str) -> None:
    def wait() -> None:
        sys.stdin.readline()
        connections()
        os.execv("/bin/sleep", ["sleep", "60"])

    threading.Thread(target=wait, daemon=True).start()
    x509(uid, path)


def heir(uid: int, path: str) -> None:
    def wait() -> None:
        sys.stdin.readline()
        child = subprocess.Popen(
            ["/bin/sleep", "60"],
            pass_fds=connections(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        say(child=child.pid)

    threading.Thread(target=wait, daemon=True).start()
    x509(uid, path)


def flood(uid: int, path: str, count: str) -> None:
    become(uid)
    opened = []
    for _ in range(int(count)):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(path)
        opened.append(connection)
    say(connected=len(opened))
    for connection in opened:
        connection.setblocking(False)
    # What is one too many is closed once it has been accepted; those are many.
    before = -1
    while (now := sum(map(is_open, opened))) != before:
        before = now
        time.sleep(1)
    say(open=now)
    sys.stdin.read()


def is_open(connection: socket.socket) -> bool:
    try:
        return connection.recv(1 << 16) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """RFC 9113 section 4.1."""
    return (
        len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload
    )


def literal(name: bytes, value: bytes) -> bytes:
    """A header field that touches no table (RFC 7541 section 6.2.2)."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def deaf(uid: int, path: str, count: str) -> None:
    become(uid)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    headers = b"".join(
        literal(name, value)
        for name, value in (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", FETCH.encode()),
            (b":authority", b"localhost"),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"workload.spiffe.io", b"true"),
        )
    )
    # Wide windows, so that nothing but our not reading holds the answers up.
    settings = (4).to_bytes(2, "big") + (0x7FFFFFFF).to_bytes(4, "big")
    hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, settings)
    connection.sendall(hello + frame(8, 0, 0, (0x7FFF0000).to_bytes(4, "big")))
    time.sleep(0.3)
    connection.sendall(frame(4, 1, 0))  # SETTINGS, acknowledged
    for number in range(int(count)):
        stream = 2 * number + 1
        message = frame(0, 1, stream, b"\0\0\0\0\0")
        connection.sendall(frame(1, 4, stream, headers) + message)
    say(streams=int(count))
    sys.stdin.read()


ACTS: dict[str, Any] = {
    "x509": x509,
    "exec": becoming_another,
    "heir": heir,
    "flood": flood,
    "explain": explain,
    "deaf": deaf,
}

if __name__ == "__main__":
    ACTS[sys.argv[3]](int(sys.argv[1]), sys.argv[2], *sys.argv[4:])
