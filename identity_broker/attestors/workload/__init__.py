"""Workload attestors: what the kernel, the init system and the container engine say of a process.

- An attestor reads through `Process`, never by a bare pid: a reused pid is noticed.
- It vouches for facts alone; which identity they make is the entries' business.
"""

from __future__ import annotations

from typing import Protocol

from identity_broker.domain.selector import Selector


class Process(Protocol):
    """A process that is known not to be confused with another one of the same pid.

    Implemented by `identity_broker.localpeer.process.LiveProcess`.
    """

    @property
    def pid(self) -> int:
        """As the agent sees it."""
        ...

    @property
    def start_time(self) -> int:
        """Clock ticks after boot (field 22 of /proc/PID/stat); with the pid, its name."""
        ...

    def read(self, name: str) -> bytes:
        """Return the content of /proc/PID/<name> ("status", "cgroup").

        Raises:
            CallerUnknown: the process has ended.
            AttestationFailed: the agent may not read it.
        """
        ...

    def handle(self, name: str) -> int:
        """Return a descriptor (O_PATH) of what /proc/PID/<name> leads to; "exe": the very file.

        To be called in a thread, as whatever is then done with it: the file system may be one whose
        owner decides when it answers.

        Returns:
            A descriptor, the caller's to close.

        Raises:
            CallerUnknown, AttestationFailed: as `read`.
        """
        ...

    def link(self, name: str) -> str:
        """Return where the symbolic link /proc/PID/<name> points ("exe", "ns/mnt").

        Raises:
            CallerUnknown, AttestationFailed: as `read`.
        """
        ...

    def check(self) -> None:
        """Make sure that it still runs, the same program as the same user.

        Raises:
            CallerUnknown: it has ended.
            ProcessChanged: it runs another program, or as another user.
        """
        ...


class WorkloadAttestor(Protocol):
    """One source of selectors."""

    @property
    def name(self) -> str:
        """The type of its selectors: "unix"."""
        ...

    @property
    def keys(self) -> frozenset[str]:
        """The first parts of the values it may vouch for ("uid"); empty: any."""
        ...

    async def attest(self, process: Process, *, wanted: frozenset[str]) -> frozenset[Selector]:
        """Return what it can vouch for.

        Args:
            wanted: the first parts of the selector values anybody asks for ("uid", "sha256"):
                what is expensive and not wanted may be left out. Empty means everything. It is
                not asked at all where none of its `keys` is wanted.

        Raises:
            AttestationFailed: it cannot tell, although it should be able to.
            CallerUnknown, ProcessChanged: as `Process.check`.
        """
        ...
