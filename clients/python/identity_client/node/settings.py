"""Where a node finds its broker, and how it proves what it is.

- Nothing is read here; `anchors` is called when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from spiffe import JwtBundle, TrustDomain

from identity_client.attestation import NodeAttestor
from identity_client.credential import BundleSnapshot
from identity_client.errors import SettingsInvalid
from identity_client.naming import broker_id, parse_trust_domain, server_name

__all__ = ["NodeSettings", "parse_address"]


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """What a node needs to know.

    Attributes:
        address: host:port of the broker's mTLS listener.
        bootstrap_address: host:port of its bootstrap listener.
        trust_domain: which broker this must be; `domain` is the same as a value.
        attestor: how to prove what this machine is.
        anchors: returns the CA certificates that are trusted first, PEM. Blocks; called at start,
            and again when TLS with the broker fails, for its roots may have been replaced. Raises
            SettingsInvalid where only a person can help, any other IdentityError to be asked again.
        state_dir: keep the node's key and SVID here, so that a restart needs no new proof.
        rpc_timeout: seconds for one call to the broker.
        version: told to the broker, for its operator; at most 64 bytes.
        longest_silence: seconds after which a stream of changes that brings nothing, not even the
            broker's heartbeat (every 15 s), counts as broken.
    """

    address: str
    bootstrap_address: str
    trust_domain: str | TrustDomain
    attestor: NodeAttestor
    anchors: Callable[[], bytes] = field(repr=False)
    state_dir: Path | None = None
    rpc_timeout: float = 10.0
    version: str = ""
    longest_silence: float = 45.0
    domain: TrustDomain = field(init=False, repr=False)
    server_name: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check what can be checked.

        Raises:
            SettingsInvalid: a value cannot be used.
        """
        parse_address(self.address, "address")
        parse_address(self.bootstrap_address, "bootstrap_address")
        domain = parse_trust_domain(self.trust_domain)
        object.__setattr__(self, "domain", domain)
        object.__setattr__(self, "server_name", server_name(broker_id(domain)))

    def read_anchors(self) -> BundleSnapshot:
        """The CA certificates that are trusted first, read now. Blocks.

        Raises:
            SettingsInvalid: there is no certificate among what `anchors` returned.
            IdentityError: what `anchors` raised.
        """
        try:
            authorities = x509.load_pem_x509_certificates(self.anchors())
        except ValueError as exc:
            raise SettingsInvalid("the trust anchors hold no PEM certificate") from exc
        return BundleSnapshot(
            trust_domain=self.domain,
            x509_authorities=tuple(authorities),
            jwt_bundle=JwtBundle(self.domain, {}),
            sequence=0,
        )


def parse_address(text: str, name: str) -> str:
    """`text`, which must be host:port.

    Raises:
        SettingsInvalid: it is not; the message calls it `name`.
    """
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise SettingsInvalid(f"{name} must be host:port")
    return text
