"""Where the broker is, how to trust it and who to ask to be.

- All problems are reported at once, by name; values are never shown.
- Nothing is read from the environment but in `settings_from_env`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from spiffe import SpiffeId, TrustDomain

from identity_client.attestation import CertificateAttestor, JoinTokenAttestor, NodeAttestor
from identity_client.credential import BundleSnapshot
from identity_client.errors import SettingsInvalid
from identity_client.naming import broker_id, parse_spiffe_id, parse_trust_domain, server_name
from identity_client.node.settings import NodeSettings, parse_address
from identity_client.staleness import DEFAULT_STALENESS, StalenessPolicy

__all__ = ["ENVIRONMENT", "STALENESS", "SourceSettings", "settings_from_env", "staleness_from_env"]

_PREFIX = "IDENTITY_BROKER_"
_REQUIRED = ("ADDRESS", "BOOTSTRAP_ADDRESS", "BUNDLE_FILE", "TRUST_DOMAIN")
_OPTIONAL = (
    "JOIN_TOKEN",
    "JOIN_TOKEN_FILE",
    "CERT_FILE",
    "KEY_FILE",
    "SPIFFE_ID",
    "STATE_DIR",
    "REVOCATION_STALENESS",
)

ENVIRONMENT = tuple(f"{_PREFIX}{name}" for name in (*_REQUIRED, *_OPTIONAL))
"""The variables that `from_env` reads."""

STALENESS = f"{_PREFIX}REVOCATION_STALENESS"
"""The variable that says what silence about revocations means, with any kind of source."""


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """What a source needs to know.

    Attributes:
        address: host:port of the broker's mTLS listener.
        bootstrap_address: host:port of its bootstrap listener.
        trust_domain: which broker this must be.
        bundle_file: PEM file with the trust domain's CA certificates, the anchor of all trust.
        attestor: how to prove what this machine is.
        spiffe_id: who to be; None for the first identity this machine is authorised for.
        state_dir: keep the node's key and SVID here, so that a restart needs no new token, and
            what is revoked, so that it is refused before the broker was reached.
        rpc_timeout: seconds for one call to the broker.
        staleness: what it means for peers when nothing is heard about revocations.
    """

    address: str
    bootstrap_address: str
    trust_domain: TrustDomain
    bundle_file: Path
    attestor: NodeAttestor
    spiffe_id: SpiffeId | None = None
    state_dir: Path | None = None
    rpc_timeout: float = 10.0
    staleness: StalenessPolicy = DEFAULT_STALENESS
    server_name: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "server_name", server_name(broker_id(self.trust_domain)))
        if self.spiffe_id is not None and self.spiffe_id.trust_domain != self.trust_domain:
            raise SettingsInvalid(
                f'"{self.spiffe_id}" is not of trust domain "{self.trust_domain}"'
            )

    @classmethod
    def make(
        cls,
        attestor: NodeAttestor,
        *,
        address: str,
        bootstrap_address: str,
        trust_domain: str | TrustDomain,
        bundle_file: str | Path,
        spiffe_id: str | SpiffeId | None = None,
        state_dir: str | Path | None = None,
        staleness: StalenessPolicy = DEFAULT_STALENESS,
    ) -> SourceSettings:
        """Settings from what people write.

        Raises:
            SettingsInvalid: a value cannot be used.
        """
        return cls(
            address=parse_address(address, "address"),
            bootstrap_address=parse_address(bootstrap_address, "bootstrap_address"),
            trust_domain=parse_trust_domain(trust_domain),
            bundle_file=Path(bundle_file),
            attestor=attestor,
            spiffe_id=None if spiffe_id is None else parse_spiffe_id(spiffe_id),
            state_dir=None if state_dir is None else Path(state_dir),
            staleness=staleness,
        )

    def node(self) -> NodeSettings:
        """The part that is about this machine as a node."""
        return NodeSettings(
            address=self.address,
            bootstrap_address=self.bootstrap_address,
            trust_domain=self.trust_domain,
            attestor=self.attestor,
            anchors=self._bundle_pem,
            state_dir=self.state_dir,
            rpc_timeout=self.rpc_timeout,
        )

    def trust_anchors(self) -> BundleSnapshot:
        """The CA certificates of `bundle_file`, read now. Blocks.

        Raises:
            SettingsInvalid: the file cannot be read, or holds no certificate.
        """
        return self.node().read_anchors()

    def _bundle_pem(self) -> bytes:
        try:
            pem = self.bundle_file.read_bytes()
            x509.load_pem_x509_certificates(pem)
        except OSError as exc:
            raise SettingsInvalid(
                f'the bundle file "{self.bundle_file}" cannot be read: '
                f"{exc.strerror or type(exc).__name__}",
                hint="idb bundle show --format pem writes the trust domain's bundle",
            ) from exc
        except ValueError as exc:
            raise SettingsInvalid(
                f'the bundle file "{self.bundle_file}" holds no PEM certificate',
                hint="idb bundle show --format pem writes the trust domain's bundle",
            ) from exc
        return pem


def settings_from_env(env: Mapping[str, str]) -> SourceSettings:
    """Settings from the variables named in ENVIRONMENT.

    Raises:
        SettingsInvalid: lists every variable that is missing or contradicts another.
    """
    found = {name: env.get(f"{_PREFIX}{name}", "") for name in (*_REQUIRED, *_OPTIONAL)}
    problems = [f"{_PREFIX}{name} is not set" for name in _REQUIRED if not found[name]]
    token, token_file = found["JOIN_TOKEN"], found["JOIN_TOKEN_FILE"]
    cert_file, key_file = found["CERT_FILE"], found["KEY_FILE"]
    if bool(cert_file) != bool(key_file):
        problems.append(f"{_PREFIX}CERT_FILE and {_PREFIX}KEY_FILE go together")
    if sum(map(bool, (token, token_file, cert_file or key_file))) != 1:
        problems.append(
            f"exactly one of {_PREFIX}JOIN_TOKEN, {_PREFIX}JOIN_TOKEN_FILE and "
            f"{_PREFIX}CERT_FILE is needed"
        )
    try:
        staleness_from_env(env)
    except SettingsInvalid as exc:
        problems.append(exc.message)
    if problems:
        raise SettingsInvalid("; ".join(problems), hint="see the SDK's README, section Environment")
    attestor: NodeAttestor
    if cert_file:
        attestor = CertificateAttestor(cert_file, key_file)
    else:
        attestor = JoinTokenAttestor(token or None, token_file=token_file or None)
    return SourceSettings.make(
        attestor,
        address=found["ADDRESS"],
        bootstrap_address=found["BOOTSTRAP_ADDRESS"],
        trust_domain=found["TRUST_DOMAIN"],
        bundle_file=found["BUNDLE_FILE"],
        spiffe_id=found["SPIFFE_ID"] or None,
        state_dir=found["STATE_DIR"] or None,
        staleness=staleness_from_env(env),
    )


def staleness_from_env(env: Mapping[str, str]) -> StalenessPolicy:
    """The staleness policy of STALENESS, or the usual one.

    Raises:
        SettingsInvalid: it names none.
    """
    text = env.get(STALENESS, "")
    try:
        return StalenessPolicy.parse(text) if text else DEFAULT_STALENESS
    except SettingsInvalid as exc:
        raise SettingsInvalid(f"{STALENESS}: {exc.message}", hint=exc.hint) from exc
