"""Keyset pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from identity_broker.domain.credential import CredentialKind, CredentialState
from identity_broker.domain.selector import Selector
from identity_ca.spiffe_id import SpiffeId

T = TypeVar("T")

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A page; `next_key` is empty on the last one."""

    items: Sequence[T]
    next_key: str


@dataclass(frozen=True, slots=True)
class EntryFilter:
    """Exact matches; None or empty means any. All `selectors` must be among the entry's."""

    spiffe_id: SpiffeId | None = None
    parent_id: SpiffeId | None = None
    selectors: frozenset[Selector] = field(default_factory=frozenset)
    owner: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class NodeFilter:
    """Exact matches; None or empty means any."""

    attestor: str = ""
    banned: bool | None = None


@dataclass(frozen=True, slots=True)
class CredentialFilter:
    """Exact matches; None or empty means any."""

    spiffe_id: SpiffeId | None = None
    node_id: SpiffeId | None = None
    entry_id: str = ""
    states: frozenset[CredentialState] = field(default_factory=frozenset)
    kind: CredentialKind | None = None
    order_id: str = ""  # those that are revoked by that order
