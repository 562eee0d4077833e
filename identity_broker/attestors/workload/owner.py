"""unix: the user and the groups of a process, by number."""

from __future__ import annotations

from identity_broker.attestors.workload import Process
from identity_broker.attestors.workload.facts import selectors_of
from identity_broker.domain.procfs import ProcessOwner, parse_status
from identity_broker.domain.selector import Selector
from identity_broker.errors import AttestationFailed


def owner_of(process: Process) -> ProcessOwner:
    """Who the process runs as.

    Raises:
        AttestationFailed: the kernel's answer cannot be understood.
        CallerUnknown: the process has ended.
    """
    try:
        return parse_status(process.read("status"))
    except ValueError as exc:
        raise AttestationFailed(
            "the kernel's account of the process cannot be understood", detail=str(exc)
        ) from exc


class UnixOwner:
    """uid, gid, supplementary_gid: nothing to wait for."""

    name = "unix"
    keys = frozenset({"uid", "gid", "supplementary_gid"})

    async def attest(self, process: Process, *, wanted: frozenset[str]) -> frozenset[Selector]:
        owner = owner_of(process)
        facts = [("uid", str(owner.uid)), ("gid", str(owner.gid))]
        facts += [("supplementary_gid", str(gid)) for gid in owner.groups]
        return selectors_of(self.name, facts)
