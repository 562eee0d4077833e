"""The states of credentials: whatever happens to them, in whatever order, the rules hold.

The model is the text of `domain.credential`; the ledger is a SQLite file.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from identity_broker.domain.credential import (
    CredentialIntent,
    CredentialOutcome,
    CredentialState,
    RevocationReason,
)
from identity_broker.domain.paging import CredentialFilter
from identity_broker.domain.selection import Selection
from identity_broker.store import Repositories, schema
from identity_broker.store.database import Database, Mode
from identity_broker.store.ledger_statements import insert_intents, write_outcomes
from identity_broker.store.mapping import intent_row
from identity_ca.spiffe_id import SpiffeId
from support.store import NOW, intent, revoking, selecting, sqlite_url

HOLD = RevocationReason.CERTIFICATE_HOLD
STOLEN = RevocationReason.KEY_COMPROMISE
IDENTITIES = [SpiffeId.parse(f"spiffe://example.org/{name}") for name in "ab"]
SELECTIONS = [
    *[f"spiffe-id={one}" for one in IDENTITIES],
    *("spiffe-id=/*", "entry=api", f"authority={'a' * 40}"),
]
ORDERS = ["rev-1", "rev-2", "rev-3"]
S = CredentialState


@dataclass(frozen=True)
class Modelled:
    """A credential as it should be."""

    intent: CredentialIntent
    state: CredentialState = S.INTENT
    digest: str = ""
    revoked_at: datetime | None = None
    reason: RevocationReason | None = None
    order: str = ""
    singled_out: bool = False


@cache
def migrated() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="states-"))
    atexit.register(shutil.rmtree, folder)
    database = Database(sqlite_url(folder), connections=1)
    schema.upgrade(database)
    database.close()
    return folder / "broker.db"


class Ledger(RuleBasedStateMachine):
    """Everything that may happen to a credential."""

    serials = Bundle("serials")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="states-"))
        url = sqlite_url(self.folder)
        shutil.copy(migrated(), self.folder / "broker.db")
        self.database = Database(url, connections=1)
        self.now = NOW
        self.model: dict[str, Modelled] = {}
        self.announced: list[str] = []

    def teardown(self) -> None:
        self.database.close()
        shutil.rmtree(self.folder)

    @contextmanager
    def transaction(self) -> Iterator[Repositories]:
        with self.database.raw_transaction(Mode.WRITE) as connection:
            yield Repositories(connection, self.now)

    def change(self, serial: str, **fields: object) -> None:
        self.model[serial] = replace(self.model[serial], **fields)  # type: ignore[arg-type]

    @rule(
        target=serials,
        identity=st.sampled_from(IDENTITIES),
        lasts=st.sampled_from([1, 3]),
        entry_id=st.sampled_from(["api", ""]),
    )
    def intend(self, identity: SpiffeId, lasts: int, entry_id: str) -> str:
        new = intent(
            f"{len(self.model):040x}",
            spiffe_id=identity,
            entry_id=entry_id,
            recorded_at=self.now,
            not_before=self.now,
            not_after=self.now + timedelta(hours=lasts),
        )
        with self.database.raw_transaction(Mode.APPEND) as connection:
            insert_intents(connection, [intent_row(new)])
        self.model[new.id] = Modelled(new)
        return new.id

    @rule(serial=serials, older=st.none() | serials)
    def conclude(self, serial: str, older: str | None) -> None:
        outcome = CredentialOutcome(serial, "e" * 64, self.now, older or "")
        with self.database.raw_transaction(Mode.APPEND) as connection:
            write_outcomes(connection, [outcome])
        if not self.model[serial].digest:
            self.change(serial, digest="e" * 64)
            if self.model[serial].state in (S.INTENT, S.UNCONFIRMED):
                self.change(serial, state=S.ISSUED)
        if older not in (None, serial) and self.model[older].state in (S.ISSUED, S.UNCONFIRMED):
            self.change(older, state=S.SUPERSEDED)

    @rule(minutes=st.sampled_from([1, 40, 100, -30]))
    def time_passes(self, minutes: int) -> None:
        self.now += timedelta(minutes=minutes)

    @rule()
    def sweep(self) -> None:
        limit = self.now - timedelta(minutes=30)
        with self.transaction() as repos:
            repos.credentials.sweep_unconfirmed(limit)
        for serial, one in self.model.items():
            if one.state is S.INTENT and one.intent.recorded_at < limit:
                self.change(serial, state=S.UNCONFIRMED)

    @rule()
    def expire(self) -> None:
        with self.transaction() as repos:
            repos.credentials.expire(self.now)
        for serial, one in self.model.items():
            over = one.intent.not_after <= self.now
            if over and one.state in (S.ISSUED, S.UNCONFIRMED, S.SUPERSEDED):
                self.change(serial, state=S.EXPIRED)

    def revoke(
        self,
        selection: Selection,
        selects: Callable[[Modelled], bool],
        reason: RevocationReason,
        order: str,
        limit: int | None,
    ) -> None:
        step = revoking(selection, reason, order=order, at=self.now, limit=limit)
        due = {
            serial
            for serial, one in self.model.items()
            if selects(one)
            and one.intent.not_after > self.now
            and (one.state is not S.REVOKED or (one.reason is HOLD and reason is not HOLD))
        }
        taken: list[str] = []
        while True:
            with self.transaction() as repos:
                revoked = [one.id for one in step(repos)]
            taken += revoked
            if limit is None or len(revoked) < limit:
                break
        assert sorted(taken) == sorted(due)
        self.announced += taken
        for serial in due:
            one = self.model[serial]
            self.change(
                serial,
                state=S.REVOKED,
                revoked_at=one.revoked_at or self.now,
                reason=reason,
                order=order,
                singled_out=one.singled_out or selection.singles_out,
            )

    @rule(
        serial=serials,
        reason=st.sampled_from([HOLD, STOLEN]),
        order=st.sampled_from(ORDERS),
    )
    def revoke_one(self, serial: str, reason: RevocationReason, order: str) -> None:
        selection = Selection(serial=serial)
        self.revoke(selection, lambda one: one.intent.id == serial, reason, order, None)

    @rule(
        text=st.sampled_from(SELECTIONS),
        reason=st.sampled_from([HOLD, STOLEN]),
        order=st.sampled_from(ORDERS),
        limit=st.sampled_from([None, 1, 3]),
    )
    def revoke_many(
        self, text: str, reason: RevocationReason, order: str, limit: int | None
    ) -> None:
        selection = selecting(text)

        def selects(one: Modelled) -> bool:
            return (
                selection.spiffe_id in (None, one.intent.spiffe_id)
                and selection.entry_id in ("", one.intent.entry_id)
                and selection.authority_id in ("", one.intent.authority_id)
            )

        self.revoke(selection, selects, reason, order, limit)

    @rule(order=st.sampled_from(ORDERS), limit=st.sampled_from([1, 100]))
    def release(self, order: str, limit: int) -> None:
        due = [
            serial
            for serial, one in self.model.items()
            if one.state is S.REVOKED
            and (one.order, one.reason) == (order, HOLD)
            and one.intent.not_after > self.now
        ]
        with self.transaction() as repos:
            released = repos.credentials.release(order, self.now, limit)
        assert released == sorted(due)[:limit]
        self.announced += released
        for serial in released:
            self.change(
                serial,
                state=S.ISSUED if self.model[serial].digest else S.UNCONFIRMED,
                revoked_at=None,
                reason=None,
                order="",
                singled_out=False,
            )

    @invariant()
    def the_ledger_says_so(self) -> None:
        with self.transaction() as repos:
            rows = repos.credentials.page(CredentialFilter(), "", 1000).items
            revoked = repos.credentials.revoked_unexpired(self.now)
            changes = repos.outbox.after(0, 10_000)
        assert {
            one.id: (one.state, one.digest, one.revoked_at, one.reason, one.order_id)
            for one in rows
        } == {
            serial: (one.state, one.digest, one.revoked_at, one.reason, one.order)
            for serial, one in self.model.items()
        }
        assert {one.id: one.singled_out for one in revoked} == {
            serial: one.singled_out
            for serial, one in self.model.items()
            if one.state is S.REVOKED and one.intent.not_after > self.now
        }
        assert sorted(change.key for change in changes) == sorted(self.announced)


Ledger.TestCase.settings = settings(max_examples=20, stateful_step_count=25)
TestLedger = Ledger.TestCase
