"""From settings to the key manager, the upstream authority and the node attestors.

- Only what the configuration names is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from identity_broker.attestors.node import NodeAttestor
from identity_broker.attestors.node.plugins import AttestorContext, build_attestor
from identity_broker.config.settings import (
    KeyManagerKind,
    OpenBaoAuth,
    OpenBaoSettings,
    Settings,
    UpstreamKind,
)
from identity_broker.domain.clock import Clock
from identity_broker.domain.node import JoinToken
from identity_broker.errors import ConfigError
from identity_broker.store import Store
from identity_ca.backends.disk import DiskUpstream
from identity_ca.backends.file import FileKeyManager
from identity_ca.backends.memory import MemoryKeyManager
from identity_ca.backends.selfsigned import SelfSignedUpstream
from identity_ca.errors import CAError
from identity_ca.keys import KeyManager
from identity_ca.upstream import UpstreamAuthority

if TYPE_CHECKING:
    from identity_ca.backends.vault.auth import AuthMethod
    from identity_ca.backends.vault.session import VaultSession


@dataclass(frozen=True, slots=True)
class Backends:
    """What signs and who certifies it; `session` is set when OpenBao is used."""

    keys: KeyManager
    upstream: UpstreamAuthority
    session: VaultSession | None


def build_backends(settings: Settings, resources: ExitStack) -> Backends:
    """Build the key manager and the upstream authority; `resources` closes them.

    Raises:
        ConfigError: the settings name something that cannot be used.
    """
    try:
        session = _session(settings.openbao, resources) if settings.needs_openbao else None
        keys = _key_manager(settings, session)
        upstream = _upstream(settings, session)
    except CAError as error:
        raise ConfigError(error.message, hint=error.hint, detail=error.detail) from error
    return Backends(keys, upstream, session)


def build_attestors(settings: Settings, store: Store, clock: Clock) -> dict[str, NodeAttestor]:
    """Build the node attestors that the settings enable, by name.

    Raises:
        ConfigError: the settings name something that cannot be used.
    """

    async def consume(token_hash: str) -> JoinToken:
        now = clock.now()
        return await store.write(lambda repos: repos.join_tokens.consume(token_hash, now))

    async def release(token_hash: str) -> None:
        await store.write(lambda repos: repos.join_tokens.release(token_hash))

    context = AttestorContext(settings.server.trust_domain, clock, consume, release)
    enabled: dict[str, Mapping[str, Any]] = dict(settings.attestors.plugins)
    if settings.attestors.join_token.enabled:
        enabled["join_token"] = {}
    ca_bundle = settings.attestors.x509_pop.ca_bundle_file
    if ca_bundle is not None:
        enabled["x509_pop"] = {"ca_bundle_file": ca_bundle}
    return {name: build_attestor(name, context, table) for name, table in enabled.items()}


def _key_manager(settings: Settings, session: VaultSession | None) -> KeyManager:
    kind = settings.ca.key_manager
    if kind is KeyManagerKind.MEMORY:
        return MemoryKeyManager()
    if kind is KeyManagerKind.FILE:
        return FileKeyManager(settings.ca.file.directory)
    from identity_ca.backends.vault.transit import TransitKeyManager  # noqa: PLC0415  # only if named

    if session is None:
        raise ConfigError("ca.key_manager = transit needs the openbao table")
    openbao = settings.openbao
    return TransitKeyManager(
        session,
        mount=openbao.transit_mount,
        names={"x509": openbao.x509_key, "jwt": openbao.jwt_key},
    )


def _upstream(settings: Settings, session: VaultSession | None) -> UpstreamAuthority:
    kind = settings.ca.upstream
    if kind is UpstreamKind.SELFSIGNED:
        return SelfSignedUpstream()
    if kind is UpstreamKind.DISK:
        disk = settings.ca.disk
        if disk.cert_file is None or disk.key_file is None:
            raise ConfigError("ca.upstream = disk needs ca.disk.cert_file and ca.disk.key_file")
        return DiskUpstream(disk.cert_file, disk.key_file, disk.bundle_file)
    from identity_ca.backends.vault.pki import VaultPkiUpstream  # noqa: PLC0415  # only if named

    if session is None:
        raise ConfigError("ca.upstream = vault_pki needs the openbao table")
    return VaultPkiUpstream(
        session, mount=settings.openbao.pki_mount, issuer_ref=settings.openbao.pki_issuer
    )


def _session(openbao: OpenBaoSettings, resources: ExitStack) -> VaultSession:
    from identity_ca.backends.vault.session import (  # noqa: PLC0415  # only if named
        VaultSession,
        VaultSettings,
    )

    if openbao.address is None:
        raise ConfigError("openbao.address is required when OpenBao is used")
    certificate = (
        (openbao.cert_file, openbao.key_file)
        if openbao.cert_file is not None and openbao.key_file is not None
        else None
    )
    session = VaultSession(
        VaultSettings(
            address=openbao.address,
            namespace=openbao.namespace,
            ca_file=openbao.ca_file,
            client_certificate=certificate,
            timeout=openbao.timeout.total_seconds(),
            redirect_hosts=frozenset(openbao.redirect_hosts),
        ),
        _auth(openbao),
    )
    resources.callback(session.close)
    return session


def _auth(openbao: OpenBaoSettings) -> AuthMethod:
    from identity_ca.backends.vault import auth  # noqa: PLC0415  # only if OpenBao is used

    if openbao.auth is OpenBaoAuth.TOKEN and openbao.token_file is not None:
        return auth.TokenAuth(openbao.token_file)
    if openbao.auth is OpenBaoAuth.APPROLE and openbao.role_id_file is not None:
        return auth.AppRoleAuth(
            openbao.role_id_file.read_text(encoding="utf-8").strip(),
            secret_id_file=openbao.secret_id_file,
            wrapped_secret_id_file=openbao.wrapped_secret_id_file,
        )
    if openbao.auth is OpenBaoAuth.KUBERNETES and openbao.kubernetes_jwt_file is not None:
        return auth.KubernetesAuth(openbao.role, openbao.kubernetes_jwt_file)
    if openbao.auth is OpenBaoAuth.CERT:
        return auth.ClientCertificateAuth(openbao.role)
    raise ConfigError(f"openbao.auth = {openbao.auth.value} lacks its files")
