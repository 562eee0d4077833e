"""How one process is told apart from all others, of this boot and of earlier ones.

- What names it outlives it: the broker's ledger keeps it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

from identity_broker.agent.svids import SvidKey
from identity_broker.attestors.workload import Process
from identity_broker.domain.procfs import parse_stat
from identity_client.node.values import SyncedEntry

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_BOOT_DIGITS: Final = 8


def key_for(entry: SyncedEntry, process: Process) -> SvidKey:
    """Which SVID the process gets for an entry."""
    return SvidKey(entry.id, instance_of(process) if entry.per_process else "")


def instance_of(process: Process) -> str:
    """How one process is told apart in the ledger, from those of earlier boots as well."""
    return f"pid:{process.pid} start:{process.start_time} boot:{_boot()}"


def is_over(instance: str) -> bool:
    """Whether the process that `instance_of` named has ended."""
    try:
        pid, start, boot = (part.partition(":")[2] for part in instance.split())
        stat = parse_stat(Path("/proc", str(int(pid)), "stat").read_bytes())
        return stat.start_time != int(start) or boot != _boot()
    except (OSError, ValueError):
        return True


@cache
def _boot() -> str:
    """The first digits of this boot's random id: what the ledger remembers outlives a boot."""
    try:
        return _BOOT_ID.read_text("ascii")[:_BOOT_DIGITS]
    except OSError:
        return "unknown"
