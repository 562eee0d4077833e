"""Everything that can be configured, one model a table.

- A value here is valid: types, ranges and the rules between fields were checked on the way in.
- Secrets are file references; the one exception, `store.url`, is a SecretStr.
- Settings stop at the composition root: inner layers are given values.
- Every field says what it is; `config.reference` renders these texts.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    model_validator,
)

from identity_broker.config.duration import (
    AuthorityLife,
    NodeLife,
    Retention,
    Seconds,
    ShortLife,
    SvidLife,
    Sweep,
)
from identity_broker.domain.duration import parse_duration
from identity_ca.errors import SpiffeIdError
from identity_ca.keys import KeyAlgorithm
from identity_ca.spiffe_id import TrustDomain

DEFAULT_DATA_DIR: Final = Path("/var/lib/identity-broker")
MASK: Final = "********"
_HOST: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", re.ASCII)
# sun_path holds 107 bytes and a NUL; the inner socket of `localpeer` needs 3 bytes more than ours.
MAX_SOCKET_PATH_BYTES: Final = 104


class KeyManagerKind(StrEnum):
    """Where signing keys live."""

    MEMORY = "memory"
    FILE = "file"
    TRANSIT = "transit"


class UpstreamKind(StrEnum):
    """Who certifies the broker's X.509 authority."""

    SELFSIGNED = "selfsigned"
    DISK = "disk"
    VAULT_PKI = "vault_pki"


class OpenBaoAuth(StrEnum):
    """How the broker logs in to OpenBao."""

    TOKEN = "token"
    APPROLE = "approle"
    KUBERNETES = "kubernetes"
    CERT = "cert"


class LogLevel(StrEnum):
    """The least severe line that is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """How a log line looks."""

    JSON = "json"
    CONSOLE = "console"


def _trust_domain(value: object) -> TrustDomain:
    if isinstance(value, TrustDomain):
        return value
    try:
        return TrustDomain(str(value))
    except SpiffeIdError as exc:
        raise ValueError('must be a trust domain name such as "example.org"') from exc


def _address(value: str) -> str:
    host, colon, port = value.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError('must be "host:port", such as "127.0.0.1:8081"; port 0 takes a free one')
    if host.startswith("[") and host.endswith("]"):
        try:
            ipaddress.IPv6Address(host[1:-1])
        except ValueError as exc:
            raise ValueError("the part in brackets must be an IPv6 address") from exc
    elif not _HOST.fullmatch(host):
        raise ValueError("the host must be a name, an IPv4 address or an IPv6 address in brackets")
    return value


def _socket_path(value: Path) -> Path:
    if len(str(value).encode()) > MAX_SOCKET_PATH_BYTES:
        raise ValueError(f"a Unix socket's path may have at most {MAX_SOCKET_PATH_BYTES} bytes")
    return value


def _http_url(value: str) -> str:
    if not re.fullmatch(r"https?://[^\s/@?#]{1,255}", value, re.ASCII) or not value.isascii():
        raise ValueError('must be a URL such as "https://openbao.example.org:8200"')
    return value


def _store_url(value: SecretStr) -> SecretStr:
    scheme, colon, rest = value.get_secret_value().partition("://")
    if not colon or scheme not in {"sqlite", "postgresql", "postgresql+psycopg"}:
        raise ValueError('must begin with "sqlite:///" or "postgresql://"')
    if scheme == "sqlite" and (not rest.startswith("/") or len(rest) == 1 or ":memory:" in rest):
        raise ValueError("an in-memory database would forget what was issued; name a file")
    return value


class InputFile:
    """Marks a path that must be a readable file when the broker starts."""


TrustDomainName = Annotated[
    TrustDomain, BeforeValidator(_trust_domain), PlainSerializer(str, return_type=str)
]
Address = Annotated[str, AfterValidator(_address)]
SocketPath = Annotated[Path, AfterValidator(_socket_path)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
StoreUrl = Annotated[SecretStr, AfterValidator(_store_url)]
ReadableFile = Annotated[Path, InputFile()]
SelectorType = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
PerSecond = Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False)]
Burst = Annotated[int, Field(ge=1, le=10_000_000)]


class Section(BaseModel):
    """A table of the configuration."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        arbitrary_types_allowed=True,
        validate_default=False,
    )

    def conflicts(self) -> Mapping[str, str]:
        """Rules between the fields of this table that do not hold: field name → rule."""
        return {}


def _text(described: str, default: str = "") -> Any:
    """A field whose default depends on another one; `default` says how."""
    return Field(default=None, description=described, json_schema_extra={"default_text": default})


class ServerSettings(Section):
    """The broker itself: its trust domain, its directory and its listeners."""

    trust_domain: TrustDomainName = Field(
        description='The trust domain all identities belong to, such as "example.org".'
    )
    data_dir: Path = Field(
        default=DEFAULT_DATA_DIR,
        description="Directory for everything the broker writes. Must belong to it alone.",
    )
    address: Address = Field(
        default="127.0.0.1:8081", description="mTLS listener: nodes, workloads, administrators."
    )
    bootstrap_address: Address = Field(
        default="127.0.0.1:8082",
        description="TLS listener without client certificates: attestation and bundles.",
    )
    http_address: Address = Field(
        default="127.0.0.1:8083",
        description="HTTP listener: health, readiness, metrics, bundle. Not encrypted.",
    )
    admin_socket: SocketPath = _text(
        "Unix socket for local administration.", "<data_dir>/admin.sock"
    )
    admin_gid: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Group that may use the admin socket beside root and the broker's own user.",
    )
    drain_timeout: Seconds = Field(
        default=parse_duration("10s"),
        description="How long running calls may take to end when the broker stops.",
    )
    bundle_file: Path = _text(
        "Where the broker writes the trust bundle (PEM).", "<data_dir>/bundle.pem"
    )
    dns_names: tuple[str, ...] = Field(
        default=(),
        description="DNS names of the broker, added to its own certificate.",
    )


class StoreSettings(Section):
    """The database."""

    url: StoreUrl = _text(
        "sqlite:///FILE or postgresql://… . May hold a password: it is never shown.",
        "sqlite:///<data_dir>/broker.db",
    )
    url_file: ReadableFile | None = Field(
        default=None, description="File that holds the URL, instead of `url`."
    )


class FileKeysSettings(Section):
    """The key manager "file"."""

    directory: Path = _text("Directory for the keys, mode 0700.", "<data_dir>/keys")


class DiskUpstreamSettings(Section):
    """The upstream "disk": a CA whose key lies in a file."""

    cert_file: ReadableFile | None = Field(
        default=None, description="The CA certificate (PEM), with its intermediates."
    )
    key_file: ReadableFile | None = Field(default=None, description="The CA's key (PEM).")
    bundle_file: ReadableFile | None = Field(
        default=None, description="The root certificates (PEM), when cert_file is no root."
    )


class CaSettings(Section):
    """The signing authorities."""

    key_manager: KeyManagerKind = Field(
        default=KeyManagerKind.FILE, description="Where signing keys live."
    )
    key_algorithm: KeyAlgorithm = Field(
        default=KeyAlgorithm.EC_P256, description="Key of the X.509 authority."
    )
    jwt_key_algorithm: KeyAlgorithm = Field(
        default=KeyAlgorithm.EC_P256, description="Key of the JWT authority."
    )
    upstream: UpstreamKind = Field(
        default=UpstreamKind.SELFSIGNED, description="Who certifies the X.509 authority."
    )
    x509_ca_ttl: AuthorityLife = Field(
        default=parse_duration("7d"), description="Life of an X.509 authority."
    )
    jwt_key_ttl: AuthorityLife = Field(
        default=parse_duration("7d"), description="Life of a JWT authority."
    )
    file: FileKeysSettings = Field(
        default_factory=FileKeysSettings, description='For key_manager = "file".'
    )
    disk: DiskUpstreamSettings = Field(
        default_factory=DiskUpstreamSettings, description='For upstream = "disk".'
    )

    def conflicts(self) -> Mapping[str, str]:
        """See `Section.conflicts`."""
        found = {}
        if self.upstream is UpstreamKind.DISK:
            for name in ("cert_file", "key_file"):
                if getattr(self.disk, name) is None:
                    found[f"disk.{name}"] = 'required when ca.upstream is "disk"'
        if self.jwt_key_algorithm is KeyAlgorithm.ED25519:
            found["jwt_key_algorithm"] = "JWT-SVIDs are signed with an EC or RSA key"
        if self.key_algorithm is KeyAlgorithm.ED25519:
            found["key_algorithm"] = "an X.509 authority needs an EC or RSA key"
        return found


class OpenBaoSettings(Section):
    """OpenBao (or Vault), for key_manager = "transit" and upstream = "vault_pki"."""

    address: HttpUrl | None = Field(default=None, description="URL of the server.")
    ca_file: ReadableFile | None = Field(
        default=None, description="Root certificates (PEM) the server is verified with."
    )
    namespace: str = Field(default="", description="Namespace, if any.")
    timeout: Seconds = Field(
        default=parse_duration("10s"), description="Longest wait for one answer."
    )
    redirect_hosts: tuple[str, ...] = Field(
        default=(),
        description='Other nodes of the cluster, as "host:port", that a redirect may name.',
    )
    auth: OpenBaoAuth = Field(default=OpenBaoAuth.APPROLE, description="How to log in.")
    token_file: ReadableFile | None = Field(default=None, description='For auth = "token".')
    role_id_file: ReadableFile | None = Field(default=None, description='For auth = "approle".')
    secret_id_file: ReadableFile | None = Field(default=None, description='For auth = "approle".')
    wrapped_secret_id_file: ReadableFile | None = Field(
        default=None,
        description='For auth = "approle": a response-wrapping token instead of secret_id_file.',
    )
    role: str = Field(
        default="", description='For auth = "kubernetes" or "cert": the role to log in as.'
    )
    kubernetes_jwt_file: ReadableFile | None = Field(
        default=None, description='For auth = "kubernetes": the service account\'s token.'
    )
    cert_file: ReadableFile | None = Field(
        default=None, description='For auth = "cert": client certificate (PEM).'
    )
    key_file: ReadableFile | None = Field(
        default=None, description='For auth = "cert": its key (PEM).'
    )
    transit_mount: str = Field(default="transit", description="Path of the Transit engine.")
    x509_key: str = Field(default="idb-x509", description="Transit key of the X.509 authority.")
    jwt_key: str = Field(default="idb-jwt", description="Transit key of the JWT authority.")
    pki_mount: str = Field(default="pki", description="Path of the PKI engine.")
    pki_issuer: str = Field(default="idb-root", description="PKI issuer that signs the authority.")

    def missing(self) -> Mapping[str, str]:
        """What is missing to log in: field name → rule."""
        found = {}
        if self.address is None:
            found["address"] = "required when OpenBao is used"
        needed = {
            OpenBaoAuth.TOKEN: ("token_file",),
            OpenBaoAuth.APPROLE: ("role_id_file",),
            OpenBaoAuth.KUBERNETES: ("role", "kubernetes_jwt_file"),
            OpenBaoAuth.CERT: ("role", "cert_file", "key_file"),
        }[self.auth]
        for name in needed:
            if not getattr(self, name):
                found[name] = f'required when openbao.auth is "{self.auth}"'
        if self.auth is OpenBaoAuth.APPROLE and (
            (self.secret_id_file is None) == (self.wrapped_secret_id_file is None)
        ):
            found["secret_id_file"] = (
                "set either openbao.secret_id_file or openbao.wrapped_secret_id_file"
            )
        return found


class SvidSettings(Section):
    """How long SVIDs live."""

    x509_ttl: SvidLife = Field(
        default=parse_duration("1h"), description="X.509-SVID, unless its entry says otherwise."
    )
    jwt_ttl: ShortLife = Field(
        default=parse_duration("5m"), description="JWT-SVID, unless its entry says otherwise."
    )
    node_ttl: NodeLife = Field(default=parse_duration("1h"), description="A node's own SVID.")
    max_x509_ttl: SvidLife = Field(
        default=parse_duration("24h"), description="Longest X.509-SVID an entry may ask for."
    )
    max_jwt_ttl: ShortLife = Field(
        default=parse_duration("1h"), description="Longest JWT-SVID an entry may ask for."
    )

    def conflicts(self) -> Mapping[str, str]:
        """See `Section.conflicts`."""
        found = {}
        if self.x509_ttl > self.max_x509_ttl:
            found["x509_ttl"] = "must not be longer than svid.max_x509_ttl"
        if self.jwt_ttl > self.max_jwt_ttl:
            found["jwt_ttl"] = "must not be longer than svid.max_jwt_ttl"
        return found


class JoinTokenSettings(Section):
    """Node attestor "join_token"."""

    enabled: bool = Field(default=True, description="Whether nodes may join with a token.")


class X509PopSettings(Section):
    """Node attestor "x509_pop": proof of possession of an existing certificate."""

    ca_bundle_file: ReadableFile | None = Field(
        default=None,
        description="Roots (PEM) that sign the nodes' certificates. Setting it enables x509_pop.",
    )


class AttestorSettings(Section):
    """Node attestors."""

    join_token: JoinTokenSettings = Field(
        default_factory=JoinTokenSettings, description="Single-use tokens."
    )
    x509_pop: X509PopSettings = Field(
        default_factory=X509PopSettings, description="Existing certificates."
    )
    plugins: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Attestors of other packages: name → the plugin's own settings.",
    )

    def conflicts(self) -> Mapping[str, str]:
        """See `Section.conflicts`."""
        return {
            f"plugins.{name}": f"is built in; use attestors.{name}"
            for name in ("join_token", "x509_pop")
            if name in self.plugins
        }


class EntrySettings(Section):
    """What registration entries may say."""

    selector_types: tuple[SelectorType, ...] = Field(
        default=(),
        description="Selector types of attestors that are not built in; their values are taken as "
        "they are. Those of attestors.plugins are known without being listed.",
    )


class LedgerSettings(Section):
    """The ledger of issued credentials."""

    unconfirmed_after: Sweep = Field(
        default=parse_duration("60s"),
        description="After this time, an intent without an outcome counts as unconfirmed.",
    )
    retain_expired: Retention = Field(
        default=parse_duration("90d"), description="How long expired credentials stay listed."
    )


class BundleSettings(Section):
    """The trust bundle."""

    refresh_hint: ShortLife = Field(
        default=parse_duration("60s"), description="How often readers should ask for it again."
    )


class RevocationSettings(Section):
    """Revocation lists, OCSP and the proof that verifiers have heard."""

    public_url: HttpUrl | None = Field(
        default=None,
        description="Where verifiers reach the HTTP listener. Named in X.509-SVIDs as the place of "
        "their revocation list and OCSP responder; they name none when it is not set.",
    )
    crl_validity: ShortLife = Field(
        default=parse_duration("1h"),
        description="From a revocation list to its next update; renewed at half of that.",
    )
    crl_shards: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=64,
        description="Into how many partial lists the serial numbers of an authority are divided. "
        "X.509-SVIDs issued before a change name the lists of before.",
    )
    ocsp_validity: ShortLife = Field(
        default=parse_duration("10m"), description="From an OCSP answer to its next update."
    )
    acknowledge_timeout: Seconds = Field(
        default=parse_duration("10s"),
        description="How long a revocation's statement waits for verifiers to acknowledge it.",
    )
    leak_reports: bool = Field(
        default=True,
        description="Whether anyone who has a key or token may report it as leaked over HTTP.",
    )
    leak_reports_per_minute: Annotated[int, Field(ge=1, le=6000)] = Field(
        default=30, description="Reports of leaks that are looked at, for each network address."
    )


class LimitSettings(Section):
    """Calls a second, per caller and method. A batch counts as many calls as it has items."""

    attest_per_second: PerSecond = Field(
        default=10, description="Attestations, per network address."
    )
    attest_burst: Burst = Field(default=100, description="Attestations at once.")
    issue_per_second: PerSecond = Field(default=2_000, description="SVIDs, per node.")
    issue_burst: Burst = Field(default=20_000, description="SVIDs at once.")
    read_per_second: PerSecond = Field(default=200, description="Reads.")
    read_burst: Burst = Field(default=1_000, description="Reads at once.")
    write_per_second: PerSecond = Field(default=2_000, description="Changes.")
    write_burst: Burst = Field(default=20_000, description="Changes at once.")
    watch_per_second: PerSecond = Field(default=5, description="Streams opened.")
    watch_burst: Burst = Field(default=50, description="Streams opened at once.")
    follow_per_second: PerSecond = Field(
        default=500, description="Streams of revocations opened, by all replicas of an identity."
    )
    follow_burst: Burst = Field(default=2_000, description="Streams of revocations at once.")

    def conflicts(self) -> Mapping[str, str]:
        """See `Section.conflicts`."""
        return {
            name: "must be at least 500, the largest batch"
            for name in ("issue_burst", "write_burst")
            if getattr(self, name) < 500
        }


class LogSettings(Section):
    """The log."""

    level: LogLevel = Field(default=LogLevel.INFO, description="The least severe line written.")
    format: LogFormat = Field(default=LogFormat.JSON, description="How a line looks.")
    file: Path | None = Field(
        default=None, description="File to append to, instead of standard error."
    )


class Settings(Section):
    """The whole configuration. Made by `config.loading.load`, or `Settings.load` for short."""

    server: ServerSettings
    store: StoreSettings = Field(default_factory=StoreSettings)
    ca: CaSettings = Field(default_factory=CaSettings)
    openbao: OpenBaoSettings = Field(default_factory=OpenBaoSettings)
    svid: SvidSettings = Field(default_factory=SvidSettings)
    attestors: AttestorSettings = Field(default_factory=AttestorSettings)
    entries: EntrySettings = Field(default_factory=EntrySettings)
    ledger: LedgerSettings = Field(default_factory=LedgerSettings)
    bundle: BundleSettings = Field(default_factory=BundleSettings)
    revocation: RevocationSettings = Field(default_factory=RevocationSettings)
    limits: LimitSettings = Field(default_factory=LimitSettings)
    log: LogSettings = Field(default_factory=LogSettings)

    @classmethod
    def load(
        cls,
        path: Path | None,
        overrides: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Settings:
        """Read the configuration; see `config.loading.load`.

        Raises:
            ConfigError: lists every problem at once.
        """
        from identity_broker.config.loading import load  # noqa: PLC0415  # it imports this module

        return load(path, overrides, env)

    def masked(self) -> dict[str, str]:
        """Dotted key → effective value as text, secrets as stars."""
        from identity_broker.config.reference import masked  # noqa: PLC0415  # imports this module

        return masked(self)

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, raw: Any) -> Any:
        return with_derived(raw) if isinstance(raw, Mapping) else raw

    @model_validator(mode="after")
    def _agree(self) -> Self:
        problems = conflicts_between(self)
        if problems:
            raise ValueError("; ".join(f"{key}: {rule}" for key, rule in problems.items()))
        return self

    @property
    def needs_openbao(self) -> bool:
        """Whether signing depends on OpenBao."""
        return (
            self.ca.key_manager is KeyManagerKind.TRANSIT
            or self.ca.upstream is UpstreamKind.VAULT_PKI
        )

    @property
    def database_url(self) -> str:
        """The URL to open, read from `store.url_file` where that is set. Secret.

        Raises:
            OSError: the file cannot be read.
        """
        if self.store.url_file is not None:
            return self.store.url_file.read_text(encoding="utf-8").strip()
        return self.store.url.get_secret_value()


def with_derived(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with the defaults filled in that depend on `server.data_dir`."""
    tables: dict[str, Any] = dict(raw)
    server = tables.get("server", {})
    if not isinstance(server, Mapping):
        return tables
    data_dir = Path(str(server.get("data_dir", DEFAULT_DATA_DIR)))
    _fill(tables, ("server", "admin_socket"), str(data_dir / "admin.sock"))
    _fill(tables, ("server", "bundle_file"), str(data_dir / "bundle.pem"))
    _fill(tables, ("store", "url"), f"sqlite:///{data_dir / 'broker.db'}")
    _fill(tables, ("ca", "file", "directory"), str(data_dir / "keys"))
    return tables


def _fill(tables: dict[str, Any], key: tuple[str, ...], value: Any) -> None:
    table = tables
    for name in key[:-1]:
        inner = table.get(name, {})
        if not isinstance(inner, Mapping):
            return  # The wrong type is reported where it stands.
        table[name] = dict(inner)
        table = table[name]
    table.setdefault(key[-1], value)


def conflicts_between(settings: Settings) -> dict[str, str]:
    """Rules between tables, and inside them, that do not hold: dotted key → rule."""
    found = {
        f"{table}.{name}": rule
        for table in Settings.model_fields
        for name, rule in getattr(settings, table).conflicts().items()
    }
    if settings.needs_openbao:
        found |= {f"openbao.{name}": rule for name, rule in settings.openbao.missing().items()}
    for name, longest in (
        ("x509_ttl", "x509_ca_ttl"),
        ("node_ttl", "x509_ca_ttl"),
        ("jwt_ttl", "jwt_key_ttl"),
    ):
        if getattr(settings.svid, name) > getattr(settings.ca, longest):
            found[f"svid.{name}"] = f"must not be longer than ca.{longest}"
    addresses: dict[str, str] = {}
    for name in ("address", "bootstrap_address", "http_address"):
        address = getattr(settings.server, name)
        if not address.endswith(":0") and address in addresses:
            found[f"server.{name}"] = f"is the same as server.{addresses[address]}"
        addresses[address] = name
    return found
