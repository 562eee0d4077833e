"""A node: it proves itself to the broker, keeps its own SVID, and is told what concerns it.

- `NodeKeeper` is the moving part; an identity source and the node agent are built on it.
- Names are imported when they are first used: the values alone need no gRPC.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from identity_client.node.keeper import NodeKeeper
    from identity_client.node.settings import NodeSettings
    from identity_client.node.values import (
        IssuedJwt,
        IssuedX509,
        JwtRequest,
        NodePhase,
        NodeStatus,
        SyncedBundle,
        SyncedEntry,
        SyncedEpoch,
        SyncedJwtKey,
        SyncedRevocation,
        SyncEvent,
        SyncLost,
        SyncPosition,
        SyncUpdate,
        Verifier,
        X509Request,
        entry_digest,
    )

__all__ = [
    "IssuedJwt",
    "IssuedX509",
    "JwtRequest",
    "NodeKeeper",
    "NodePhase",
    "NodeSettings",
    "NodeStatus",
    "SyncEvent",
    "SyncLost",
    "SyncPosition",
    "SyncUpdate",
    "SyncedBundle",
    "SyncedEntry",
    "SyncedEpoch",
    "SyncedJwtKey",
    "SyncedRevocation",
    "Verifier",
    "X509Request",
    "entry_digest",
]

_HOMES = {"NodeKeeper": "keeper", "NodeSettings": "settings"}

if not TYPE_CHECKING:  # so that a type checker still knows which names there are

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'identity_client.node' has no attribute {name!r}")
        home = importlib.import_module(f"identity_client.node.{_HOMES.get(name, 'values')}")
        return getattr(home, name)
