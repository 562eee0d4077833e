"""What a broker would need, looked at before it is started: `idb server check`.

- Nothing is signed, migrated, spent or left behind: a wrapped secret-id stays wrapped, so with
  one the log-in to OpenBao is not tried; a SQLite file that is not there yet is not made.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path

from identity_broker.config.settings import KeyManagerKind, Settings
from identity_broker.domain.clock import Clock
from identity_broker.server.backends import build_backends
from identity_broker.store import Store

_SQLITE = "sqlite:///"


async def check_dependencies(settings: Settings, clock: Clock) -> list[str]:
    """Look at the database, the key manager and the upstream authority; name what was looked at.

    Raises:
        StoreUnavailable: the database does not answer.
        ConfigError, CAError: keys or upstream cannot be used.
    """
    done = []
    if not _is_unmade(settings.database_url):
        store = Store(settings.database_url, clock=clock)
        await store.open()
        try:
            await store.read(lambda _repositories: None)
        finally:
            await store.close()
        done.append("store")
    wrapped = settings.needs_openbao and settings.openbao.wrapped_secret_id_file is not None
    new_keys = (
        settings.ca.key_manager is KeyManagerKind.FILE and not settings.ca.file.directory.exists()
    )
    if not wrapped and not new_keys:
        done += await asyncio.to_thread(_check_signing, settings)
    return done


def _is_unmade(url: str) -> bool:
    return url.startswith(_SQLITE) and not Path(url.removeprefix(_SQLITE)).exists()


def _check_signing(settings: Settings) -> list[str]:
    with ExitStack() as resources:
        backends = build_backends(settings, resources)
        backends.keys.check()
        backends.upstream.check()
        return [f"key manager {backends.keys.name}", f"upstream {backends.upstream.name}"]
