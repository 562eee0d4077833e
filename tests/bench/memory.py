"""What a broker needs with many registration entries: memory, and time until it is ready."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
from sqlalchemy import insert

from bench.servers import started, write_config
from identity_broker.config.settings import Settings
from identity_broker.domain.clock import SystemClock
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.selector import Selector
from identity_broker.store import Repositories, Store, mapping, tables
from identity_ca.spiffe_id import SpiffeId

_CHUNK = 2_000
_NOW = datetime.now(UTC)
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Footprint:
    """A broker process, freshly started on a filled database.

    Attributes:
        rss_mib: resident once it was ready.
        start_seconds: from the start of the process until it serves.
    """

    entries: int
    rss_mib: float
    start_seconds: float
    cpu_seconds: float
    fill_seconds: float


def measure(directory: Path, entries: int) -> Footprint:
    """Fill a database, start a broker on it, look, and stop it."""
    config = write_config(directory, directory)
    url = Settings.load(config, env={}).database_url
    began = time.perf_counter()
    asyncio.run(fill(url, [_entry(number) for number in range(entries)]))
    filled = time.perf_counter() - began
    with started(directory) as (pid, _, _, seconds):
        process = psutil.Process(pid)
        time.sleep(0.5)
        times = process.cpu_times()
        return Footprint(
            entries,
            process.memory_info().rss / _MIB,
            seconds,
            times.user + times.system,
            filled,
        )


async def fill(url: str, entries: Sequence[RegistrationEntry]) -> None:
    """Make a database with these entries in it."""
    store = Store(url, clock=SystemClock())
    await store.migrate()
    try:
        for first in range(0, len(entries), _CHUNK):
            made = entries[first : first + _CHUNK]

            def insert_all(repos: Repositories, made: Sequence[RegistrationEntry] = made) -> None:
                # The rows that `create` makes, without its questions: 20 times as fast.
                connection = repos.entries._connection
                connection.execute(
                    insert(tables.spiffe_ids),
                    [
                        {"folded": str(e.spiffe_id).lower(), "spelling": str(e.spiffe_id)}
                        for e in made
                    ],
                )
                connection.execute(insert(tables.entries), list(map(mapping.entry_values, made)))
                connection.execute(
                    insert(tables.entry_selectors),
                    [values for entry in made for values in mapping.selector_values(entry)],
                )

            await store.write(insert_all)
    finally:
        await store.close()


def _entry(number: int) -> RegistrationEntry:
    """One of 50 below each of many nodes, with the selectors a real one has."""
    return RegistrationEntry(
        id=f"bench-{number}",
        spiffe_id=SpiffeId.parse(f"spiffe://example.org/ns/team-{number % 97}/sa/service-{number}"),
        parent_id=SpiffeId.parse(f"spiffe://example.org/idb/node/join_token/host-{number // 50}"),
        selectors=frozenset(
            {
                Selector("unix", f"uid:{10_000 + number % 50}"),
                Selector("unix", f"path:/opt/team-{number % 97}/bin/service-{number}"),
            }
        ),
        dns_names=(f"service-{number}.example.org",),
        revision=1,
        created_at=_NOW,
        updated_at=_NOW,
    )
