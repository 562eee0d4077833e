"""plan: what revoking a subject would hit, before anything is done.

- A subject that nobody knows is refused: a slip of the pen would look like a success. Only a key
  may be blocked before anything is issued to it.
- Counted in one snapshot of the store.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from identity_broker.domain import names
from identity_broker.domain.clock import Clock
from identity_broker.domain.revocation import LedgerCount, RevocationSubject, SubjectKind
from identity_broker.domain.selection import Selection
from identity_broker.errors import SubjectNotFound
from identity_broker.store import Repositories, Store
from identity_ca.spiffe_id import SpiffeId

MOST_NAMED: Final = 100


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
        stranded_node_ids: nodes that it does not ban, whose own SVID would be revoked, and that
            cannot attest again by themselves; at most 100 of `stranded_node_count`.
    """

    subject: RevocationSubject
    count: LedgerCount
    held_entry_ids: tuple[str, ...]
    held_entry_count: int
    holds: bool
    blocked_keys: tuple[str, ...]
    stranded_node_ids: tuple[SpiffeId, ...] = ()
    stranded_node_count: int = 0


class Plans:
    """Says what revoking would hit."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def of(self, subject: RevocationSubject) -> RevocationPlan:
        """Say what revoking the subject would hit.

        Raises:
            SubjectNotFound: nothing is known of it.
            StoreUnavailable: the database did not answer.
        """
        selection = Selection.of(subject)
        now = self._clock.now()
        holds = stops_issuance(selection)

        def read(repos: Repositories) -> RevocationPlan:
            stranded: tuple[SpiffeId, ...] = ()
            number = 0
            if selection.node is None:
                stranded, number = repos.nodes.stranded_by(selection, now, MOST_NAMED)
            return RevocationPlan(
                subject=subject,
                count=survey(repos, subject, selection, now),
                held_entry_ids=repos.entries.covered_ids(selection, MOST_NAMED) if holds else (),
                held_entry_count=repos.entries.count_covered(selection) if holds else 0,
                holds=holds,
                blocked_keys=_keys_of(subject),
                stranded_node_ids=stranded,
                stranded_node_count=number,
            )

        return await self._store.read(read)


def _keys_of(subject: RevocationSubject) -> tuple[str, ...]:
    return (subject.value,) if subject.kind is SubjectKind.KEY_FINGERPRINT else ()


def stops_issuance(selection: Selection) -> bool:
    """Whether a hold on the selection can keep anything from being issued."""
    if selection.node is not None:
        return True
    if selection.spiffe_id is not None and names.is_reserved(selection.spiffe_id):
        return False  # the broker's own: it makes itself another one
    return selection.is_of_entries


def survey(
    repos: Repositories, subject: RevocationSubject, selection: Selection, now: datetime
) -> LedgerCount:
    """Count what the ledger knows of a subject.

    Raises:
        SubjectNotFound: nobody knows anything of it.
    """
    count = repos.credentials.count(selection, now)
    known = (
        count.live_x509
        or count.live_jwt
        or count.already_revoked
        or count.expired
        or subject.kind is SubjectKind.KEY_FINGERPRINT
        or _is_stored(repos, subject, selection)
    )
    if not known:
        raise SubjectNotFound(f"nothing is known of {str(subject)[:256]}")
    return count


def _is_stored(repos: Repositories, subject: RevocationSubject, selection: Selection) -> bool:
    """Whether an entry, a node or an authority is what the subject names."""
    if subject.kind is SubjectKind.AUTHORITY:
        return any(authority.id == subject.value for authority in repos.authorities.all())
    if selection.node is not None:
        return repos.nodes.find(selection.node) is not None
    return bool(repos.entries.covered_ids(selection, 1))
