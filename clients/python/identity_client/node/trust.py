"""By which keys a node recognises its broker, and checks what it is issued.

- First the operator's anchors; from the first answer on, the broker's own bundle.
- Where TLS fails, both: the broker's roots may have been replaced while the node was away, and
  either may be the newer. What the broker then says narrows it down again.
"""

from __future__ import annotations

import asyncio
import logging

from identity_client.credential import BundleSnapshot
from identity_client.errors import IdentityError, IdentityNotReady
from identity_client.node.settings import NodeSettings

__all__ = ["NodeTrust"]

_logger = logging.getLogger(__name__)


class NodeTrust:
    """What one node trusts now.

    Attributes:
        bundle: the newest known; None until there is anything to trust.
        message: the same as the broker sent it; empty for anchors.
    """

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._anchors: BundleSnapshot | None = None
        self.bundle: BundleSnapshot | None = None
        self.message = b""

    async def begin(self) -> None:
        """Reads the anchors, unless there is something to trust already.

        Raises:
            IdentityError: they cannot be had.
        """
        if self.bundle is None:
            self.bundle = await asyncio.to_thread(self._settings.read_anchors)

    @property
    def current(self) -> BundleSnapshot:
        """What certificates are checked with.

        Raises:
            IdentityNotReady: there is nothing to trust yet.
        """
        if self.bundle is None:
            raise IdentityNotReady("there is no trust anchor yet")
        return self.bundle

    @property
    def roots(self) -> bytes:
        """What the broker is recognised by, PEM; raises as `current`."""
        extra = self._anchors.roots_pem if self._anchors is not None else b""
        return self.current.roots_pem + extra

    @property
    def widened(self) -> bool:
        """Whether the anchors are accepted beside the bundle."""
        return self._anchors is not None

    async def widen(self) -> bool:
        """Accepts the operator's anchors, too; returns whether they could be read."""
        try:
            self._anchors = await asyncio.to_thread(self._settings.read_anchors)
        except IdentityError as error:
            _logger.warning("the trust anchors cannot be read again: %s", error)
            return False
        return True

    def take(self, bundle: BundleSnapshot, message: bytes = b"") -> bool:
        """Trusts what the broker says; returns whether that makes a difference."""
        different = self.widened or self.bundle is None or not self.bundle.same_keys(bundle)
        self._anchors = None
        if different:
            self.bundle = bundle
        if message:
            self.message = message
        return different
