"""`DIR/dev.json`: how everything else finds what `idb dev --dir DIR` runs.

- It is there exactly while the tree is ready: written whole (temporary file, rename, 0600) when
  everything answers, removed when it stops.
- After a kill -9 a stale one may remain; its `pid` tells.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from identity_broker.dev.errors import DevDirectoryUnusable, DevNotRunning

FILE_NAME = "dev.json"


@dataclass(frozen=True, slots=True)
class BrokerAddresses:
    """Where the broker listens."""

    address: str
    bootstrap_address: str
    admin_socket: str
    http_address: str


@dataclass(frozen=True, slots=True)
class AgentAddresses:
    """The node agent, and the node it is."""

    admin_socket: str
    node_id: str


@dataclass(frozen=True, slots=True)
class DevState:
    """What runs in a directory. `openbao_address` is empty with the local CA.

    `workload_api` is a `unix:///…` address for any SPIFFE client; it is empty, and `agent` None,
    where no agent runs.
    """

    trust_domain: str
    broker: BrokerAddresses
    openbao_address: str
    bundle_file: str
    pid: int
    workload_api: str = ""
    agent: AgentAddresses | None = None

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read it.

        Raises:
            DevNotRunning: there is none.
            DevDirectoryUnusable: it cannot be read or is not one.
        """
        path = directory / FILE_NAME
        try:
            return cls._from_document(json.loads(path.read_text()))
        except FileNotFoundError as exc:
            raise DevNotRunning(
                f'no idb dev runs in "{directory}"', hint=f"start it: idb dev --dir {directory}"
            ) from exc
        except OSError as exc:
            raise DevDirectoryUnusable(f'"{path}" cannot be read: {exc.strerror}') from exc
        except (ValueError, KeyError, TypeError) as exc:
            raise DevDirectoryUnusable(
                f'"{path}" is not what idb dev writes', hint="stop idb dev and start it again"
            ) from exc

    @classmethod
    def _from_document(cls, document: Any) -> Self:
        return cls(
            trust_domain=str(document["trust_domain"]),
            broker=BrokerAddresses(
                address=str(document["broker"]["address"]),
                bootstrap_address=str(document["broker"]["bootstrap_address"]),
                admin_socket=str(document["broker"]["admin_socket"]),
                http_address=str(document["broker"]["http_address"]),
            ),
            openbao_address=str(document["openbao"]["address"]),
            bundle_file=str(document["bundle_file"]),
            pid=int(document["pid"]),
            workload_api=str(document.get("workload_api", "")),
            agent=_agent(document.get("agent")),
        )

    def to_document(self) -> dict[str, Any]:
        """As it stands in the file."""
        document = {
            "trust_domain": self.trust_domain,
            "broker": asdict(self.broker),
            "openbao": {"address": self.openbao_address},
            "bundle_file": self.bundle_file,
            "pid": self.pid,
        }
        if self.agent is not None:
            document["workload_api"] = self.workload_api
            document["agent"] = asdict(self.agent)
        return document

    def write(self, directory: Path) -> None:
        """Write it whole: a reader sees all of it or none."""
        write_private(directory / FILE_NAME, json.dumps(self.to_document(), indent=2) + "\n")


def _agent(found: Any) -> AgentAddresses | None:
    if found is None:
        return None
    return AgentAddresses(str(found["admin_socket"]), str(found["node_id"]))


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner reads (0600), whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
