"""Nodes: machines (or processes) that an attestor vouched for, and the tokens they join with."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from identity_broker.domain.selector import Selector
from identity_ca.spiffe_id import SpiffeId


@dataclass(frozen=True, slots=True)
class Node:
    """An attested node as the broker knows it."""

    spiffe_id: SpiffeId
    attestor: str
    selectors: frozenset[Selector]
    attested_at: datetime
    serial: str
    expires_at: datetime
    reattestable: bool
    banned: bool = False
    ban_reason: str = ""


@dataclass(frozen=True, slots=True)
class AttestedNode:
    """What a node attestor proved, before anything is issued. Only `lifecycle.attest` builds it."""

    spiffe_id: SpiffeId
    attestor: str
    selectors: frozenset[Selector]
    reattestable: bool


@dataclass(frozen=True, slots=True)
class JoinToken:
    """A single-use token as stored: its SHA-256, never itself."""

    token_hash: str
    node_id: SpiffeId
    expires_at: datetime
    created_at: datetime
    used_at: datetime | None = None
