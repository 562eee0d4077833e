"""Bundle: what the trust domain is verified with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping

from identity_api.broker.v1 import bundle_pb2 as pb
from identity_broker.server.rpc.call import Call
from identity_broker.server.rpc.convert import trust as convert_trust
from identity_broker.server.rpc.pipeline import ServiceFunction
from identity_broker.server.rpc.watch import subscription
from identity_broker.signing import Signing
from identity_ca.bundle import TrustBundle


class BundleService:
    """The bundle, once or whenever it changes.

    Args:
        listen: subscribes to new bundles; the returned function stops it.
    """

    def __init__(
        self,
        signing: Signing,
        listen: Callable[[Callable[[TrustBundle], None]], Callable[[], None]],
    ) -> None:
        self._signing = signing
        self._listen = listen

    def functions(self) -> Mapping[str, ServiceFunction]:
        """Full method name to service function."""
        service = "/identity_api.broker.v1.Bundle/"
        return {f"{service}Get": self.get, f"{service}Watch": self.watch}

    async def get(self, _request: pb.GetBundleRequest, _call: Call) -> pb.GetBundleResponse:
        """Return the bundle."""
        return pb.GetBundleResponse(bundle=convert_trust.to_bundle(self._signing.bundle))

    async def watch(
        self, _request: pb.WatchBundleRequest, _call: Call
    ) -> AsyncIterator[pb.WatchBundleResponse]:
        """Send the bundle at once and again whenever it changes."""
        with subscription(self._listen) as watcher:
            yield pb.WatchBundleResponse(bundle=convert_trust.to_bundle(self._signing.bundle))
            async for bundle in watcher.items():
                yield pb.WatchBundleResponse(bundle=convert_trust.to_bundle(bundle))
