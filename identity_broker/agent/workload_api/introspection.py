"""gRPC health and reflection on the agent's socket (EP-10): new services, not new methods.

- Health: the empty name is the agent; a service's name is that service. It says whether the agent
  can answer, not whether the caller would get an identity.
- Reflection lists what is served; descriptors hold no secret.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from identity_broker.agent.identity import Caller
from identity_broker.agent.workload_api.front import Front, Handler
from identity_broker.errors import ServiceNotFound

HEALTH: Final = "grpc.health.v1.Health"
REFLECTION: Final = "grpc.reflection.v1alpha.ServerReflection"
HEALTH_POLL_SECONDS: Final = 1.0


def health_handlers(
    front: Front, services: Sequence[str], is_serving: Callable[[], bool]
) -> dict[str, Handler]:
    """Check and Watch of grpc.health.v1."""
    known = {"", *services}

    def state() -> health_pb2.HealthCheckResponse:
        serving = health_pb2.HealthCheckResponse.SERVING
        status = serving if is_serving() else health_pb2.HealthCheckResponse.NOT_SERVING
        return health_pb2.HealthCheckResponse(status=status)

    async def check(
        request: health_pb2.HealthCheckRequest, _caller: Caller
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in known:
            raise ServiceNotFound("this agent serves no service of that name")
        return state()

    async def watch(
        request: health_pb2.HealthCheckRequest, _caller: Caller
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        if request.service not in known:
            yield health_pb2.HealthCheckResponse(
                status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            )
            await asyncio.Event().wait()  # The protocol keeps such a stream open.
        told: health_pb2.HealthCheckResponse | None = None
        while True:
            now = state()
            if now != told:
                yield now
            told = now
            await asyncio.sleep(HEALTH_POLL_SECONDS)

    request = health_pb2.HealthCheckRequest
    return {
        f"/{HEALTH}/Check": front.unary(f"/{HEALTH}/Check", request, check),
        f"/{HEALTH}/Watch": front.stream(f"/{HEALTH}/Watch", request, watch),
    }


def reflection_handlers(front: Front, services: Sequence[str]) -> dict[str, Handler]:
    """The reflection service, for grpcurl and the like."""
    # The published types take its asynchronous generator for a coroutine.
    servicer: Any = reflection.aio.ReflectionServicer(sorted([*services, HEALTH, REFLECTION]))

    async def info(requests: AsyncIterator[Any], _caller: Caller) -> AsyncIterator[Any]:
        async for response in servicer.ServerReflectionInfo(requests, None):
            yield response

    name = f"/{REFLECTION}/ServerReflectionInfo"
    return {name: front.duplex(name, reflection_pb2.ServerReflectionRequest, info)}
