"""Every metric of the broker, declared once.

- Labels have closed sets of values and are always present: a method, a reason, a dependency.
  Never a SPIFFE ID, an address or anything else a stranger can choose.
- A registry of its own, so that two brokers in one process do not share numbers.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.process_collector import ProcessCollector

from identity_broker.telemetry.loop_metrics import LoopCounter, LoopHistogram

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
_RPC_SECONDS: Final = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
_SIGNING_SECONDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.01, 0.05, 0.25, 1.0, 5.0)
_BATCH: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
# Close to the objective of one second, where it matters on which side a verifier was.
_PROPAGATION_SECONDS: Final = (
    *(0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3),
    *(0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 60.0),
)


class Metrics:
    """The broker's metrics; attributes are named like the metric without its `idb_` prefix."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self.registry = registry
        ProcessCollector(registry=registry)
        self.build = Info("idb_build", "Version of the broker", registry=registry)
        # calls
        self.rpc_total = LoopCounter(
            "idb_rpc", "Calls that ended, by method and reason", ("method", "reason"), registry
        )
        self.rpc_seconds = LoopHistogram(
            "idb_rpc_seconds", "Time a unary call took", ("method",), _RPC_SECONDS, registry
        )
        self.streams_open = Gauge(
            "idb_streams_open", "Streams being served", ("method",), registry=registry
        )
        self.local_connections = Gauge(
            "idb_local_connections", "Connections on the admin socket", registry=registry
        )
        # credentials
        self.issued_total = Counter(
            "idb_issued_total", "Credentials issued", ("kind",), registry=registry
        )
        self.refused_total = Counter(
            "idb_refused_total",
            "Items of a batch that were refused, by kind and reason",
            ("kind", "reason"),
            registry=registry,
        )
        self.revoked_total = Counter(
            "idb_revoked_total", "Credentials revoked", ("kind",), registry=registry
        )
        self.ocsp_total = LoopCounter(
            "idb_ocsp", "OCSP requests answered, by what was said", ("outcome",), registry
        )
        self.unconfirmed_total = Counter(
            "idb_unconfirmed_total", "Intents whose outcome never came", registry=registry
        )
        self.attested_total = Counter(
            "idb_attested_total",
            "Nodes attested or refused, by attestor and reason",
            ("attestor", "reason"),
            registry=registry,
        )
        # revocation lists
        self.crl_entries = Gauge(
            "idb_crl_entries", "Revoked X.509-SVIDs on the full lists in force", registry=registry
        )
        self.crl_bytes = Gauge(
            "idb_crl_bytes", "Size of the full lists in force", registry=registry
        )
        self.crl_expires = Gauge(
            "idb_crl_expires_timestamp_seconds",
            "When the first of the full lists in force expires",
            registry=registry,
        )
        self.crl_seconds = Histogram(
            "idb_crl_seconds",
            "Time it took to make a list, by what it covers",
            ("kind",),
            buckets=_RPC_SECONDS,
            registry=registry,
        )
        self.crl_failed_total = Counter(
            "idb_crl_failed", "Attempts to make lists that failed", ("reason",), registry=registry
        )
        # connected agents
        self.agents_connected = Gauge(
            "idb_agents_connected", "Node agents connected to this broker", registry=registry
        )
        self.sync_messages_total = Counter(
            "idb_sync_messages_total", "Messages sent to node agents", registry=registry
        )
        self.sync_full_total = Counter(
            "idb_sync_full_total", "Full states sent to node agents", registry=registry
        )
        self.sync_ack_seconds = Histogram(
            "idb_sync_ack_seconds",
            "Time from a message to its acknowledgement",
            buckets=_RPC_SECONDS,
            registry=registry,
        )
        # verifiers
        self.verifiers_connected = Gauge(
            "idb_verifiers_connected",
            "Verifiers that this broker tells of revocations: agents, workloads with a link of "
            "their own, and workloads behind agents",
            ("kind",),
            registry=registry,
        )
        self.revocation_propagation_seconds = Histogram(
            "idb_revocation_propagation_seconds",
            "Time from a revocation's commit to a connected verifier's acknowledgement",
            buckets=_PROPAGATION_SECONDS,
            registry=registry,
        )
        self.revocation_acknowledgements_total = Counter(
            "idb_revocation_acknowledgements_total",
            "Verifiers that were connected when a revocation committed: within_objective (one "
            "second), late, or never (silent or gone when its statement was due); objective: 99 % "
            "within",
            ("outcome",),
            registry=registry,
        )
        self.feed_messages_total = Counter(
            "idb_feed_messages_total", "Messages sent to verifiers", registry=registry
        )
        self.feed_full_total = Counter(
            "idb_feed_full_total", "Full states sent to verifiers", registry=registry
        )
        # the parts
        self.ledger_pending = Gauge(
            "idb_ledger_pending", "Ledger rows waiting for a commit", registry=registry
        )
        self.ledger_commit_seconds = Histogram(
            "idb_ledger_commit_seconds",
            "Time a group commit took",
            buckets=_SIGNING_SECONDS,
            registry=registry,
        )
        self.ledger_commit_rows = Histogram(
            "idb_ledger_commit_rows", "Rows of a group commit", buckets=_BATCH, registry=registry
        )
        self.directory_entries = Gauge(
            "idb_directory_entries", "Registration entries in memory", registry=registry
        )
        self.directory_nodes = Gauge("idb_directory_nodes", "Nodes in memory", registry=registry)
        self.directory_sequence = Gauge(
            "idb_directory_sequence", "Change feed position the memory reflects", registry=registry
        )
        self.signing_seconds = Histogram(
            "idb_signing_seconds",
            "Time to sign, a batch counting once",
            ("kind",),
            buckets=_SIGNING_SECONDS,
            registry=registry,
        )
        self.authority_expires = Gauge(
            "idb_authority_expires_timestamp_seconds",
            "When the active authority expires",
            ("kind",),
            registry=registry,
        )
        self.status_sightings_total = Counter(
            "idb_status_sightings_total",
            "Looks at our own revocation lists and OCSP answers from outside, by what was found",
            ("outcome",),
            registry=registry,
        )
        self.job_total = Counter(
            "idb_job_total", "Runs of a background job", ("job", "reason"), registry=registry
        )
        self.dependency_up = Gauge(
            "idb_dependency_up", "1 when the dependency answered last", ("name",), registry=registry
        )

    def render(self) -> bytes:
        """The Prometheus text of all metrics."""
        return generate_latest(self.registry)


class AgentMetrics:
    """What only the node agent measures; attributes are named like the broker's.

    Args:
        registry: of the `Metrics` that the agent counts its calls with.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self.registry = registry
        # the stream from the broker
        self.agent_connected = Gauge(
            "idb_agent_connected", "1 while the stream to the broker stands", registry=registry
        )
        self.agent_revision = Gauge(
            "idb_agent_revision", "Change feed position the agent stands at", registry=registry
        )
        self.agent_syncs_total = Counter(
            "idb_agent_syncs_total",
            "Updates from the broker, by what became of them",
            ("reason",),
            registry=registry,
        )
        # what it holds
        self.agent_entries = Gauge(
            "idb_agent_entries", "Entries the node may ask SVIDs for", registry=registry
        )
        self.agent_svids = Gauge("idb_agent_svids", "SVIDs held", ("kind",), registry=registry)
        self.agent_overdue = Gauge(
            "idb_agent_overdue", "X.509-SVIDs past their renewal time", registry=registry
        )
        self.agent_revocations = Gauge(
            "idb_agent_revocations",
            "Revoked credentials that are refused on this machine",
            registry=registry,
        )
        # what it orders
        self.agent_issued_total = Counter(
            "idb_agent_issued_total", "SVIDs obtained", ("kind",), registry=registry
        )
        self.agent_refused_total = Counter(
            "idb_agent_refused_total",
            "SVIDs not obtained, by kind and reason",
            ("kind", "reason"),
            registry=registry,
        )
        self.agent_order_seconds = Histogram(
            "idb_agent_order_seconds",
            "Time the broker took for a batch of orders",
            buckets=_RPC_SECONDS,
            registry=registry,
        )
        # whom it serves
        self.agent_connections = Gauge(
            "idb_agent_connections", "Connections of workloads", registry=registry
        )
        self.agent_watches = Gauge(
            "idb_agent_watches", "Streams of workloads being served", registry=registry
        )
        self.agent_followers = Gauge(
            "idb_agent_followers",
            "Streams of workloads that follow revocations",
            registry=registry,
        )
        self.agent_attest_seconds = Histogram(
            "idb_agent_attest_seconds",
            "Time it took to attest a process",
            buckets=_SIGNING_SECONDS,
            registry=registry,
        )
