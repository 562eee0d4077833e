"""What a node keeps over a restart: its key, its SVID and the bundle, in a state directory.

- A full disk stops nothing: the problem is told, and the next save tries again.
- Without a directory nothing is kept, and there is no problem.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import DecodeError
from spiffe import TrustDomain

from identity_api.broker.v1 import types_pb2
from identity_client._wire.convert import bundle_from_wire
from identity_client.clock import utc_now
from identity_client.credential import BundleSnapshot, X509Material
from identity_client.errors import ProtocolViolation, SettingsInvalid
from identity_client.state_dir import NodeState, StateDir

__all__ = ["KeptNode", "NodeMemory"]

_logger = logging.getLogger(__name__)
_PASSING = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True, slots=True)
class KeptNode:
    """A node as it was kept.

    Attributes:
        bundle: the newest this node has seen.
        bundle_message: the same, as it was sent.
        reattestable: whether the broker lets the node attest again.
    """

    material: X509Material
    bundle: BundleSnapshot
    bundle_message: bytes = field(repr=False)
    reattestable: bool


class NodeMemory:
    """The state directory of one node.

    Attributes:
        problem: why what should be kept is not; empty when it is.
    """

    def __init__(self, path: Path | None, domain: TrustDomain) -> None:
        self._path = path
        self._domain = domain
        self._directory: StateDir | None = None
        self.problem = ""

    async def open(self) -> KeptNode | None:
        """Claims the directory; returns what was kept, if it is of use.

        Raises:
            SettingsInvalid: the directory is unsafe, damaged, in use, or cannot be used.
        """
        if self._path is None:
            return None
        try:
            directory = self._directory = await asyncio.to_thread(StateDir, self._path)
        except SettingsInvalid as error:
            if getattr(error.__cause__, "errno", None) not in _PASSING:
                raise
            self._note(error)
            return None
        try:
            return self._usable(directory, await asyncio.to_thread(directory.load))
        except BaseException:
            self.close()
            raise

    async def save(self, node: KeptNode) -> None:
        """Replaces what was kept; a failure is told by `problem`."""
        if self._path is None:
            return
        state = NodeState(
            trust_domain=self._domain.name,
            key_pem=node.material.key_pem,
            chain=tuple(
                one.public_bytes(serialization.Encoding.DER)
                for one in node.material.svid.cert_chain
            ),
            bundle=node.bundle_message,
            reattestable=node.reattestable,
        )
        try:
            if self._directory is None:
                self._directory = await asyncio.to_thread(StateDir, self._path)
            await asyncio.to_thread(self._directory.save, state)
        except SettingsInvalid as error:
            self._note(error)
        else:
            self.problem = ""

    def close(self) -> None:
        """Lets another process use the directory."""
        if self._directory is not None:
            self._directory.close()

    def _note(self, error: SettingsInvalid) -> None:
        if not self.problem:
            _logger.warning("the node's state cannot be kept: %s", error)
        self.problem = error.message

    def _usable(self, directory: StateDir, kept: NodeState | None) -> KeptNode | None:
        if kept is None or kept.trust_domain != self._domain.name:
            return None
        try:
            message = types_pb2.TrustBundle.FromString(kept.bundle)
            bundle = bundle_from_wire(message, self._domain)
            key = serialization.load_pem_private_key(kept.key_pem, password=None)
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise TypeError
            material = X509Material.from_chain(
                kept.chain, private_key=key, bundle=bundle, received=utc_now()
            )
        except (ProtocolViolation, DecodeError, ValueError, TypeError) as damage:
            if getattr(damage, "reason", "") == "CHAIN_UNTRUSTED":
                # Its authority was withdrawn after it was issued: nobody accepts it any more.
                _logger.warning("the kept node SVID does not lead to the kept trust bundle")
                return None
            # "from None": the parser's message could quote the key.
            raise directory.damaged() from None
        if material.not_after <= utc_now():
            return None
        return KeptNode(material, bundle, kept.bundle, kept.reattestable)
