"""gRPC server reflection: the names and messages of what is served, for grpcurl and the like.

- Only the services of the method table are listed; descriptors hold no secret.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from grpc_reflection.v1alpha import reflection

from identity_broker.server.rpc.call import Call
from identity_broker.server.rpc.pipeline import ServiceFunction

METHOD = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


def service_names(methods: Iterable[str]) -> list[str]:
    """The services of full methods, sorted."""
    return sorted({method.removeprefix("/").partition("/")[0] for method in methods})


def reflection_services(services: Mapping[str, ServiceFunction]) -> dict[str, ServiceFunction]:
    """The reflection function for what is served; reflection itself is listed as well."""
    # The published types take its asynchronous generator for a coroutine.
    servicer: Any = reflection.aio.ReflectionServicer(service_names([*services, METHOD]))

    async def info(requests: AsyncIterator[Any], _call: Call) -> AsyncIterator[Any]:
        async for response in servicer.ServerReflectionInfo(requests, None):
            yield response

    return {METHOD: info}
