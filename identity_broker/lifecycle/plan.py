"""plan: what revoking a subject would hit, before anything is done."""

from __future__ import annotations

from dataclasses import dataclass

from identity_broker.domain.revocation import LedgerCount, RevocationSubject


@dataclass(frozen=True, slots=True)
class RevocationPlan:
    """What revoking a subject would hit at this moment.

    Attributes:
        subject: in canonical spelling.
        count: what the ledger knows of it.
        held_entry_ids: entries that nothing would be issued from; at most 100 of
            `held_entry_count`.
        holds: whether a hold comes with it unless refused.
        blocked_keys: fingerprints of keys that would be refused for ever.
    """

    subject: RevocationSubject
    count: LedgerCount
    held_entry_ids: tuple[str, ...]
    held_entry_count: int
    holds: bool
    blocked_keys: tuple[str, ...]
