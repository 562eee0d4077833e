"""The Workload API on a real socket, over identities that the test grants and withdraws."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_status import rpc_status

from identity_broker.agent.listener import WorkloadListener
from identity_broker.agent.workload_api.limits import CallerLimits, Limits
from identity_broker.agent.workload_api.service import WorkloadApi
from identity_broker.telemetry.metrics import Metrics
from identity_client._wire.workload import SECURITY_METADATA, WorkloadApiStub
from support.workload_identities import FakeIdentities

PROBE = Path(__file__).with_name("workload_probe.py")


@dataclass
class ServedWorkloadApi:
    """A Workload API that is up.

    Attributes:
        address: as in SPIFFE_ENDPOINT_SOCKET.
    """

    identities: FakeIdentities
    listener: WorkloadListener
    service: WorkloadApi
    metrics: Metrics
    address: str
    channels: list[grpc.aio.Channel] = field(default_factory=list)

    @property
    def socket(self) -> str:
        return self.address.removeprefix("unix://")

    def channel(self, *options: tuple[str, Any]) -> Any:
        """A connection of its own; untyped, for raw bytes go through it as well."""
        channel = grpc.aio.insecure_channel(
            f"unix:{self.socket}", [("grpc.use_local_subchannel_pool", 1), *options]
        )
        self.channels.append(channel)
        return channel

    def stub(self) -> Any:
        """The standard's calls, on a connection of their own."""
        return WorkloadApiStub(self.channel())

    def counted(self, method: str, reason: str) -> int:
        """Calls that ended so."""
        return self.metrics.rpc_total.labels(method, reason).value


@asynccontextmanager
async def served(
    directory: Path,
    identities: FakeIdentities | None = None,
    *,
    limits: Limits | None = None,
    handlers: Sequence[grpc.GenericRpcHandler] = (),
    is_serving: Any = lambda: True,
    **listening: Any,
) -> AsyncIterator[ServedWorkloadApi]:
    """Serve for as long as the block lasts."""
    identities = identities or FakeIdentities()
    listener = WorkloadListener(directory / "api.sock", **listening)
    metrics = Metrics()
    service = WorkloadApi(
        identities,
        listener.callers.of,
        limits=CallerLimits(limits),
        metrics=metrics,
        is_serving=is_serving,
    )
    await listener.start([*service.handlers(), *handlers])
    api = ServedWorkloadApi(identities, listener, service, metrics, listener.address)
    try:
        yield api
    finally:
        for channel in api.channels:
            await channel.close()
        service.end_streams()
        await listener.stop(timedelta(seconds=0.2))


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that processes of every user can reach, with a short path."""
    with tempfile.TemporaryDirectory(prefix="idb-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
async def workload_api(open_directory: Path) -> AsyncIterator[ServedWorkloadApi]:
    """A Workload API on which nobody has an identity yet."""
    async with served(open_directory) as api:
        yield api


def header(**more: str) -> tuple[tuple[str, str], ...]:
    return (*SECURITY_METADATA, *more.items())


async def refusal(call: Any, timeout: float = 10) -> grpc.aio.AioRpcError:
    """How the call, or the next message of a stream, is refused."""
    async with asyncio.timeout(timeout):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            if hasattr(call, "read"):
                while await call.read() is not grpc.aio.EOF:
                    pass
                code = await call.code()
                assert code is not grpc.StatusCode.OK
                raise grpc.aio.AioRpcError(
                    code,
                    await call.initial_metadata(),
                    await call.trailing_metadata(),
                    await call.details(),
                )
            await call
    return refused.value


def details_of(error: grpc.aio.AioRpcError) -> tuple[str, float | None]:
    """The reason a refusal carries, and the seconds after which to come back."""
    reason, retry = "", None
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    for detail in status.details if status else ():
        info, again = ErrorInfo(), RetryInfo()
        if detail.Unpack(info):
            reason = str(info.reason)
        elif detail.Unpack(again):
            retry = again.retry_delay.ToTimedelta().total_seconds()
    return reason, retry


def refused_as(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str]:
    """Code and reason."""
    return error.code(), details_of(error)[0]


@asynccontextmanager
async def probe(
    api: ServedWorkloadApi | str, *arguments: str, uid: int | None = None, **options: Any
) -> AsyncIterator[asyncio.subprocess.Process]:
    """tests/support/workload_probe.py as a process of its own, of another user if asked."""
    path = api if isinstance(api, str) else api.socket
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", str(PROBE), str(uid or os.getuid()), path, *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"]},
        **options,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def line_of(process: asyncio.subprocess.Process, timeout: float = 20) -> str:
    """The next line a probe prints."""
    assert process.stdout
    async with asyncio.timeout(timeout):
        return (await process.stdout.readline()).decode().strip()
