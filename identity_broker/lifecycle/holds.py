"""holds: named stops of issuance, until they are lifted or their time is over."""

from __future__ import annotations

from dataclasses import dataclass

from identity_broker.domain.revocation import Hold


@dataclass(frozen=True, slots=True)
class HoldStatus:
    """A hold and the entries it holds now; at most 100."""

    hold: Hold
    held_entry_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lifted:
    """What lifting a hold did.

    Attributes:
        released: how many credentials are valid again.
        freed_entry_ids: entries that may be issued from again.
    """

    hold: Hold
    released: int
    freed_entry_ids: tuple[str, ...]
