"""Everything that can be configured of a node agent, one model a table.

- As `config.settings`: a value here is valid, secrets are file references, every field says what
  it is.
- Trust comes from one place: a file, or an address together with a fingerprint. Anything less has
  to be asked for by name (`trust.insecure_bootstrap`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import AfterValidator, Field, model_validator

from identity_broker.config.duration import Seconds
from identity_broker.config.settings import (
    Address,
    LogSettings,
    ReadableFile,
    Section,
    SocketPath,
    TrustDomainName,
)
from identity_broker.domain.duration import parse_duration

DEFAULT_RUNTIME_DIR: Final = Path("/run/identity-broker")
_FINGERPRINT: Final = re.compile(r"(?:sha256:)?((?:[0-9a-f]{2}:?){32})", re.ASCII | re.IGNORECASE)


def _fingerprint(value: str) -> str:
    match = _FINGERPRINT.fullmatch(value.strip())
    if match is None:
        raise ValueError("must be the SHA-256 of a root certificate, 64 hexadecimal digits")
    return match.group(1).replace(":", "").lower()


def _text(described: str, default: str) -> Any:
    """A field whose default depends on another one; `default` says how."""
    return Field(default=None, description=described, json_schema_extra={"default_text": default})


def _bundle_url(value: str) -> str:
    if not re.fullmatch(r"https?://[^\s@?#]+", value):
        raise ValueError('must be a URL such as "https://broker.example.org/bundle"')
    return value


BundleUrl = Annotated[str, AfterValidator(_bundle_url)]
Fingerprint = Annotated[str, AfterValidator(_fingerprint)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Connections = Annotated[int, Field(ge=1, le=100_000)]


class AgentSection(Section):
    """The agent itself: its trust domain, where it keeps what, and its sockets."""

    trust_domain: TrustDomainName = Field(
        description='The trust domain the broker serves, such as "example.org".'
    )
    data_dir: Path | None = Field(
        default=None,
        description="Directory for the node's key (0600), so that a restart needs no new token. "
        "Without one, the key is in memory alone.",
    )
    runtime_dir: Path = Field(
        default=DEFAULT_RUNTIME_DIR, description="Directory of the sockets, mode 0755."
    )
    workload_api: SocketPath = _text(
        "Socket of the SPIFFE Workload API, open to everybody on the machine.",
        "<runtime_dir>/workload.sock",
    )
    admin_socket: SocketPath = _text(
        "Socket of the agent's own API: `idb agent status`, `idb explain --pid`.",
        "<runtime_dir>/agent.sock",
    )
    http_address: Address | None = Field(
        default=None,
        description="HTTP listener: /healthz, /readyz, /metrics. Not encrypted; none by default.",
    )
    drain_timeout: Seconds = Field(
        default=parse_duration("2s"),
        description="How long running calls may take to end when the agent stops.",
    )


class BrokerSection(Section):
    """Where the broker is."""

    address: Address = Field(description="Its mTLS listener.")
    bootstrap_address: Address = Field(description="Its bootstrap listener, for attestation.")
    timeout: Seconds = Field(
        default=parse_duration("10s"), description="Longest wait for one answer."
    )


class TrustSection(Section):
    """How the broker is trusted the first time."""

    bundle_file: ReadableFile | None = Field(
        default=None, description="The trust domain's root certificates (PEM)."
    )
    bundle_url: BundleUrl | None = Field(
        default=None, description="Where the bundle can be had: PEM, or the SPIFFE bundle format."
    )
    bundle_fingerprints: tuple[Fingerprint, ...] = Field(
        default=(),
        description="SHA-256 of the root certificates (DER) that are believed from bundle_url.",
    )
    insecure_bootstrap: bool = Field(
        default=False,
        description="Believe whatever bundle_url answers the first time. For experiments.",
    )

    def conflicts(self) -> Mapping[str, str]:
        """See `Section.conflicts`."""
        if (self.bundle_file is None) == (self.bundle_url is None):
            return {"bundle_file": "set either trust.bundle_file or trust.bundle_url"}
        if self.bundle_file is not None:
            return {
                name: "goes with trust.bundle_url"
                for name in ("bundle_fingerprints", "insecure_bootstrap")
                if getattr(self, name)
            }
        if not self.bundle_fingerprints and not self.insecure_bootstrap:
            return {
                "bundle_fingerprints": "required with trust.bundle_url: the SHA-256 of the root "
                "certificate, from `idb bundle show` on the broker's machine"
            }
        if self.bundle_fingerprints and self.insecure_bootstrap:
            return {"insecure_bootstrap": "is pointless with trust.bundle_fingerprints"}
        return {}


class NodeSection(Section):
    """How the machine proves what it is."""

    join_token_file: Path | None = Field(
        default=None,
        description="File with a join token. It is read when it is needed, and may be gone later.",
    )
    cert_file: ReadableFile | None = Field(
        default=None, description="For x509_pop: the machine's certificate (PEM chain)."
    )
    key_file: ReadableFile | None = Field(default=None, description="For x509_pop: its key (PEM).")

    def conflicts(self) -> Mapping[str, str]:
        """See `Section.conflicts`."""
        if (self.cert_file is None) != (self.key_file is None):
            return {"cert_file": "node.cert_file and node.key_file go together"}
        if (self.join_token_file is None) == (self.cert_file is None):
            return {"join_token_file": "set either node.join_token_file or node.cert_file"}
        return {}


class WorkloadsSection(Section):
    """Whom the agent serves, and how much of it."""

    connections: Connections = Field(default=2048, description="Most connections at a time.")
    connections_per_user: Connections = Field(
        default=1024, description="Most connections of one user."
    )
    calls_per_second: Count = Field(
        default=500,
        description="Most calls of one process, streams being opened included; all processes of "
        "one user together may make four times as many.",
    )
    calls_at_once: Count = Field(default=1_000, description="Most calls of one process at once.")
    x509_svids: Count = Field(
        default=1_000,
        description="Most X.509-SVIDs held that nobody watches; as long as all entries fit, they "
        "are made before anybody asks.",
    )
    jwt_svids: Count = Field(default=10_000, description="Most JWT-SVIDs held.")
    bundles_for_all: bool = Field(
        default=False,
        description="Whether a process without an identity may have the trust bundles.",
    )


class AttestorsSection(Section):
    """The workload attestors: what is asked of a process."""

    enabled: tuple[str, ...] = Field(
        default=("unix", "systemd", "docker"), description="Which attestors are used."
    )
    deadline: Seconds = Field(
        default=parse_duration("1s"), description="How long one may take; then it is left out."
    )
    plugins: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Settings of the attestors: name → the attestor's own settings.",
    )


class AgentSettings(Section):
    """The whole configuration of an agent; made by `config.loading.load_agent`."""

    agent: AgentSection
    broker: BrokerSection
    trust: TrustSection = Field(default_factory=TrustSection)
    node: NodeSection = Field(default_factory=NodeSection)
    workloads: WorkloadsSection = Field(default_factory=WorkloadsSection)
    attestors: AttestorsSection = Field(default_factory=AttestorsSection)
    log: LogSettings = Field(default_factory=LogSettings)

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, raw: Any) -> Any:
        return agent_with_derived(raw) if isinstance(raw, Mapping) else raw

    @model_validator(mode="after")
    def _agree(self) -> Self:
        problems = agent_conflicts(self)
        if problems:
            raise ValueError("; ".join(f"{key}: {rule}" for key, rule in problems.items()))
        return self


def agent_with_derived(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with the defaults filled in that depend on `agent.runtime_dir`."""
    tables: dict[str, Any] = dict(raw)
    agent = tables.get("agent", {})
    if not isinstance(agent, Mapping):
        return tables
    runtime_dir = Path(str(agent.get("runtime_dir", DEFAULT_RUNTIME_DIR)))
    tables["agent"] = {
        "workload_api": str(runtime_dir / "workload.sock"),
        "admin_socket": str(runtime_dir / "agent.sock"),
        **agent,
    }
    return tables


def agent_conflicts(settings: AgentSettings) -> dict[str, str]:
    """Rules that do not hold: dotted key → rule."""
    found = {
        f"{table}.{name}": rule
        for table in AgentSettings.model_fields
        for name, rule in getattr(settings, table).conflicts().items()
    }
    for table, name in (("broker", "address"), ("broker", "bootstrap_address")):
        if getattr(getattr(settings, table), name).endswith(":0"):
            found[f"{table}.{name}"] = "port 0 is nobody's"
    if settings.agent.workload_api == settings.agent.admin_socket:
        found["agent.admin_socket"] = "is the same as agent.workload_api"
    return found
