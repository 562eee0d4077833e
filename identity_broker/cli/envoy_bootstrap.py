"""An Envoy's bootstrap that takes its identity from the node agent, as a document.

- Inbound: mutual TLS from peers whose SPIFFE ID is named, plain to the application beside it.
  Outbound: plain from the application, mutual TLS to a peer whose SPIFFE ID is named.
- Nobody is accepted unnamed: at least one SPIFFE ID each way. Their trust domains say whose
  authorities count.
- No key, certificate or authority stands in it, so it needs no file mode and never expires.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

AGENT_CLUSTER: Final = "identity_broker_agent"
_TLS: Final = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"
_HTTP_OPTIONS: Final = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_ROUTER: Final = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
_HTTP: Final = (
    "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3"
    ".HttpConnectionManager"
)
_TCP: Final = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"


class Protocol(Enum):
    """What flows through: HTTP/1.1 and HTTP/2 (gRPC), or bytes."""

    HTTP = "http"
    TCP = "tcp"


@dataclass(frozen=True, slots=True)
class Address:
    """A host, or an IP address, and a port.

    Raises:
        ValueError: it is not written "host:port".
    """

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read "127.0.0.1:8080", "[::1]:8080" or "stock.internal:8443"."""
        host, colon, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise ValueError(f'"{text}" is not HOST:PORT; write an IPv6 address in brackets')
        if not (colon and host and port.isascii() and port.isdigit() and int(port) < 65536):
            raise ValueError(f'"{text}" is not HOST:PORT')
        return cls(host, int(port))

    @property
    def is_ip(self) -> bool:
        """Whether no name has to be looked up."""
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return False
        return True

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine gets there."""
        return self.host == "localhost" or (
            self.is_ip and ipaddress.ip_address(self.host).is_loopback
        )

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def document(self) -> dict[str, Any]:
        """As Envoy writes it."""
        return {"socket_address": {"address": self.host, "port_value": self.port}}


@dataclass(frozen=True, slots=True)
class Inbound:
    """Mutual TLS in, plain out to the application.

    Attributes:
        accept: SPIFFE IDs of the peers let in; at least one.
    """

    listen: Address
    app: Address
    accept: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outbound:
    """Plain in from the application, mutual TLS out to a peer.

    Attributes:
        expect: SPIFFE IDs that the peer may have; at least one.
    """

    listen: Address
    peer: Address
    expect: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """What one Envoy is to do.

    Attributes:
        name: of the service, as the node's id.
        socket: path of the agent's Workload API socket.
        svid: which secret to present: "default", or a SPIFFE ID.
        check_revocation: whether a revoked peer of the own trust domain is refused; Envoy then
            refuses everybody while it has no revocation list that is fresh.
        admin: where Envoy's admin interface listens, if at all.
    """

    name: str
    socket: str
    svid: str = "default"
    protocol: Protocol = Protocol.HTTP
    check_revocation: bool = False
    inbound: Inbound | None = None
    outbound: Outbound | None = None
    admin: Address | None = None

    @property
    def trusts_several(self) -> bool:
        """Whether peers of more than one trust domain are named in one direction."""
        peers = [self.inbound.accept if self.inbound else ()]
        peers.append(self.outbound.expect if self.outbound else ())
        return any(each and authorities_for(each) == "ALL" for each in peers)

    def document(self) -> dict[str, Any]:
        """The bootstrap."""
        listeners, clusters = [], [self._agent()]
        if self.inbound:
            listeners.append(self._inbound_listener(self.inbound))
            clusters.append(self._cluster("app", self.inbound.app))
        if self.outbound:
            listeners.append(self._outbound_listener(self.outbound))
            peer = self._cluster("peer", self.outbound.peer)
            peer["transport_socket"] = self._tls("UpstreamTlsContext", self.outbound.expect)
            clusters.append(peer)
        node: dict[str, Any] = {"id": self.name, "cluster": self.name}
        if self.check_revocation:
            node["metadata"] = {"certificate_revocation_lists": True}
        document: dict[str, Any] = {"node": node}
        if self.admin:
            document["admin"] = {"address": self.admin.document()}
        document["static_resources"] = {"listeners": listeners, "clusters": clusters}
        return document

    # --- listeners ----------------------------------------------------------------------------

    def _inbound_listener(self, inbound: Inbound) -> dict[str, Any]:
        tls = self._tls("DownstreamTlsContext", inbound.accept, require_client_certificate=True)
        if self.protocol is Protocol.HTTP:
            tls["typed_config"]["common_tls_context"]["alpn_protocols"] = ["h2", "http/1.1"]
        return {
            "name": "inbound",
            "address": inbound.listen.document(),
            "filter_chains": [
                {
                    "transport_socket": tls,
                    "filters": [self._filter("inbound", "app", over_tls=True)],
                }
            ],
        }

    def _outbound_listener(self, outbound: Outbound) -> dict[str, Any]:
        return {
            "name": "outbound",
            "address": outbound.listen.document(),
            "filter_chains": [{"filters": [self._filter("outbound", "peer", over_tls=False)]}],
        }

    def _filter(self, name: str, cluster: str, *, over_tls: bool) -> dict[str, Any]:
        if self.protocol is Protocol.TCP:
            config: dict[str, Any] = {"@type": _TCP, "stat_prefix": name, "cluster": cluster}
            return {"name": "envoy.filters.network.tcp_proxy", "typed_config": config}
        route = {
            "match": {"prefix": "/"},
            "route": {
                "cluster": cluster,
                # Streams may last; what has to end in time is the application's to say.
                "timeout": "0s",
                # Only what never reached the other side.
                "retry_policy": {
                    "retry_on": "connect-failure,refused-stream,reset-before-request",
                    "num_retries": 2,
                },
            },
        }
        config = {
            "@type": _HTTP,
            "stat_prefix": name,
            "route_config": {
                "virtual_hosts": [{"name": cluster, "domains": ["*"], "routes": [route]}]
            },
            "http_filters": [
                {"name": "envoy.filters.http.router", "typed_config": {"@type": _ROUTER}}
            ],
        }
        if over_tls:
            # The application reads its peer's SPIFFE ID in x-forwarded-client-cert.
            config["forward_client_cert_details"] = "SANITIZE_SET"
            config["set_current_client_cert_details"] = {"uri": True}
            # A certificate is checked when a connection opens: none is older than this.
            config["common_http_protocol_options"] = {"max_connection_duration": "3600s"}
            config["http1_safe_max_connection_duration"] = True
        else:
            config["forward_client_cert_details"] = "SANITIZE"
        return {
            "name": "envoy.filters.network.http_connection_manager",
            "typed_config": config,
        }

    # --- clusters -----------------------------------------------------------------------------

    def _cluster(self, name: str, address: Address) -> dict[str, Any]:
        cluster: dict[str, Any] = {
            "name": name,
            "connect_timeout": "5s",
            "type": "STATIC" if address.is_ip else "STRICT_DNS",
            "load_assignment": _endpoint(name, address.document()),
        }
        if self.protocol is Protocol.HTTP:
            # HTTP/2 stays HTTP/2, so that gRPC passes; HTTP/1.1 stays HTTP/1.1.
            cluster["typed_extension_protocol_options"] = _http_options(
                use_downstream_protocol_config={"http_protocol_options": {}}
                | {"http2_protocol_options": {}}
            )
        return cluster

    def _agent(self) -> dict[str, Any]:
        return {
            "name": AGENT_CLUSTER,
            "connect_timeout": "1s",
            "type": "STATIC",
            "typed_extension_protocol_options": _http_options(
                explicit_http_config={"http2_protocol_options": {}}
            ),
            "load_assignment": _endpoint(AGENT_CLUSTER, {"pipe": {"path": self.socket}}),
        }

    # --- TLS ----------------------------------------------------------------------------------

    def _tls(self, kind: str, peers: tuple[str, ...], **more: Any) -> dict[str, Any]:
        context = {
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_3"}
            | {"tls_maximum_protocol_version": "TLSv1_3"},
            "tls_certificate_sds_secret_configs": [self._secret(self.svid)],
            "combined_validation_context": {
                "default_validation_context": {
                    "match_typed_subject_alt_names": [
                        {"san_type": "URI", "matcher": {"exact": peer}} for peer in peers
                    ]
                },
                "validation_context_sds_secret_config": self._secret(authorities_for(peers)),
            },
        }
        return {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {"@type": f"{_TLS}.{kind}", **more, "common_tls_context": context},
        }

    def _secret(self, name: str) -> dict[str, Any]:
        service = {
            "envoy_grpc": {
                "cluster_name": AGENT_CLUSTER,
                # A process without an identity yet is turned away; ask again soon.
                "retry_policy": {
                    "retry_back_off": {"base_interval": "0.25s", "max_interval": "2s"}
                },
            }
        }
        return {
            "name": name,
            "sds_config": {
                "resource_api_version": "V3",
                "api_config_source": {
                    "api_type": "DELTA_GRPC",
                    "transport_api_version": "V3",
                    "grpc_services": [service],
                },
            },
        }


def authorities_for(peers: tuple[str, ...]) -> str:
    """The secret with the authorities of the peers' trust domains: of one, or of all known."""
    domains = {peer.removeprefix("spiffe://").partition("/")[0] for peer in peers}
    return f"spiffe://{domains.pop()}" if len(domains) == 1 else "ALL"


def _endpoint(name: str, address: dict[str, Any]) -> dict[str, Any]:
    return {
        "cluster_name": name,
        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
    }


def _http_options(**how: dict[str, Any]) -> dict[str, Any]:
    return {_HTTP_OPTIONS: {"@type": f"type.googleapis.com/{_HTTP_OPTIONS}", **how}}
