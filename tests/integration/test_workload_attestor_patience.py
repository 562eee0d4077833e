"""Files that never answer keep their own user waiting, and nobody else."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from identity_broker.attestors.workload.attestation import Attestation
from identity_broker.attestors.workload.patience import PatientThreads
from identity_broker.attestors.workload.program import ProgramDigests, UnixDigest, UnixPath
from identity_broker.errors import AttestationFailed
from identity_broker.localpeer.process import LiveProcess

PATIENCE = 0.2


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """What hangs, until the test is over."""
    event = threading.Event()
    yield event
    event.set()


async def until_late(threads: PatientThreads, count: int) -> None:
    async with asyncio.timeout(10):
        while threads.late != count:
            await asyncio.sleep(0.01)


async def test_two_users_whose_files_hang_stop_nobody_else(never: threading.Event) -> None:
    threads = PatientThreads("test", patience=PATIENCE, at_a_time=2)
    stuck = [asyncio.create_task(threads.run(uid, never.wait)) for uid in (1, 2) for _ in range(9)]
    await asyncio.sleep(0)
    assert (threads.working, threads.late) == (2, 0)  # one thing of each at a time
    async with asyncio.timeout(10):
        assert await threads.run(3, lambda: "answer") == "answer"
    for problem in await asyncio.gather(*stuck, return_exceptions=True):
        assert isinstance(problem, AttestationFailed)
    assert threads.late == 4  # two threads of each, and no more
    with pytest.raises(AttestationFailed, match="too long to answer"):
        await asyncio.wait_for(threads.run(1, lambda: "never begun"), PATIENCE / 2)
    for _ in range(100):
        assert await threads.run(3, lambda: "answer") == "answer"
    never.set()
    await until_late(threads, 0)
    assert await threads.run(1, lambda: "answer") == "answer"
    assert threads.working == 0


async def test_threads_are_bounded_however_many_users_there_are(never: threading.Event) -> None:
    threads = PatientThreads("test", patience=0.05, at_a_time=4, most=10)
    before = threading.active_count()
    stuck = [asyncio.create_task(threads.run(uid, never.wait)) for uid in range(1000, 1020)]
    await until_late(threads, 10)
    assert threading.active_count() <= before + 10
    with pytest.raises(AttestationFailed):
        await threads.run(3, lambda: "answer")
    never.set()
    await until_late(threads, 0)
    await asyncio.gather(*stuck, return_exceptions=True)
    assert await threads.run(3, lambda: "answer") == "answer"


async def test_users_take_turns_and_whoever_has_gone_has_none() -> None:
    threads = PatientThreads("test", at_a_time=1)
    order: list[int] = []
    release = threading.Event()
    first = asyncio.create_task(threads.run(1, release.wait))
    await asyncio.sleep(0)
    tasks = [
        asyncio.create_task(threads.run(uid, lambda uid=uid: order.append(uid)))  # type: ignore[misc]
        for uid in (1, 1, 1, 2, 2)
    ]
    await asyncio.sleep(0)
    tasks.pop(1).cancel()
    await asyncio.sleep(0)
    release.set()
    await asyncio.gather(first, *tasks)
    assert order == [1, 2, 1, 2]


async def test_what_went_wrong_is_told(never: threading.Event) -> None:
    threads = PatientThreads("test")

    def fails() -> None:
        raise ProcessLookupError("gone")

    with pytest.raises(ProcessLookupError, match="gone"):
        await threads.run(1, fails)
    assert (threads.working, threads.late) == (0, 0)


async def test_path_and_digest_go_on_while_others_hang(never: threading.Event) -> None:
    looks = PatientThreads("test", patience=PATIENCE, at_a_time=2)
    reads = PatientThreads("test", patience=PATIENCE, at_a_time=2)
    stuck = [
        asyncio.create_task(threads.run(uid, never.wait))
        for threads in (looks, reads)
        for uid in (4001, 4001, 4002, 4002)
    ]
    attestation = Attestation([UnixPath(looks), UnixDigest(ProgramDigests(), reads)], 5)
    with closing(LiveProcess.of_pid(os.getpid())) as process:
        found = await attestation.attest(process, None)
        assert {selector.value.partition(":")[0] for selector in found.selectors} == {
            "path",
            "sha256",
        }
    await asyncio.gather(*stuck, return_exceptions=True)
