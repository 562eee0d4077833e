"""A workload in a process of its own, without our code: workload_probe.py UID SOCKET ACT.

It becomes the user UID first: the interpreter may lie where only its owner can start it.

    x509      FetchX509SVID: a line for every message, its SPIFFE IDs; a line for its end
    flood N   connects N times and keeps what stays open; a line with how many that are
    exec      the same, and becomes another program (still this connection's owner) on a line
    fork      as x509, and a child inherits the connection; the parent ends on a line of input
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
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


def x509(uid: int, path: str) -> None:
    import grpc
    from spiffe._proto.workload_pb2 import X509SVIDResponse

    become(uid)
    with grpc.insecure_channel(f"unix:{path}") as channel:
        call: Any = channel.unary_stream(FETCH, None, X509SVIDResponse.FromString)
        try:
            for message in call(b"", metadata=HEADER):
                say(ids=[each.spiffe_id for each in message.svids])
            say(end="OK")
        except grpc.RpcError as error:
            say(end=error.code().name)


def flood(uid: int, path: str, count: str) -> None:
    become(uid)
    connections = []
    for _ in range(int(count)):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(path)
        connections.append(connection)
    say(connected=len(connections))
    time.sleep(0.5)
    alive = 0
    for connection in connections:
        connection.setblocking(False)
        try:
            alive += connection.recv(1 << 16) != b""
        except BlockingIOError:
            alive += 1
        except OSError:
            pass
    say(open=alive)
    sys.stdin.read()


if __name__ == "__main__":
    act: Any = {"x509": x509, "flood": flood}[sys.argv[3]]
    act(int(sys.argv[1]), sys.argv[2], *sys.argv[4:])
