"""A process with many verifiers: each follows an agent's feed on a stream of its own.

Run as a script: SOCKET COUNT. Prints a line once all of them have the whole state; then, for every
id read from the standard input, a line once all of them deny it: how many there are, and the time.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path

import grpc

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.feed import Verifier, until, verifier

STREAMS_PER_CONNECTION = 60


async def main(socket: str, count: int) -> None:
    """Follow until the standard input ends."""
    async with AsyncExitStack() as stack:
        everybody: list[Verifier] = []
        while len(everybody) < count:
            channel = grpc.aio.insecure_channel(
                f"unix:{socket}", options=[("grpc.use_local_subchannel_pool", 1)]
            )
            stack.push_async_callback(channel.close)
            everybody += [
                await stack.enter_async_context(verifier(channel))
                for _ in range(min(STREAMS_PER_CONNECTION, count - len(everybody)))
            ]
        await until(lambda: all(one.complete_at for one in everybody), 60)
        say(len(everybody))
        while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
            await until(lambda name=line: all(name in one.denied for one in everybody), 60)  # type: ignore[misc]
            say(sum(line in one.denied and not one.over for one in everybody))


def say(count: int) -> None:
    """One line."""
    print(json.dumps({"count": count, "at": time.time()}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
