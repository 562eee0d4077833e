r"""Sets OpenBao or Vault up for one trust domain: mounts, root, keys, policy, AppRole.

    python -m identity_ca.backends.vault.provision --address https://bao:8200 \
        --token-file admin-token --trust-domain example.org --wrapped-secret-id-file wrapped

- Run it as often as you like: what is there is checked and kept, never replaced.
- What is there and is not what it must be (a key of another type, an exportable key, the root of
  another trust domain) stops it; nothing is deleted or weakened.
- The secret-id leaves the server wrapped: a file that was read on its way no longer unwraps.
- stdout gets the role-id and names, never a token.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import hvac
import requests
from cryptography import x509
from hvac import exceptions as hvac_errors

from identity_ca.backends.vault.policy import VaultLayout, broker_policy, provisioner_policy
from identity_ca.backends.vault.transit import TRANSIT_TYPES
from identity_ca.backends.vault.wire import VaultSettings
from identity_ca.errors import BackendMisconfigured, BackendUnavailable, CAError, SpiffeIdError
from identity_ca.keys import KeyAlgorithm
from identity_ca.spiffe_id import TrustDomain

__all__ = ["Provisioned", "VaultLayout", "admin_client", "main", "provision"]

_Admin = Any
"""An `hvac.Client`, of whose methods the published stubs type the half."""

_UNAVAILABLE: Final = (
    hvac_errors.VaultDown,
    hvac_errors.BadGateway,
    hvac_errors.RateLimitExceeded,
    hvac_errors.InternalServerError,
    hvac_errors.VaultNotInitialized,
)


@dataclass(frozen=True, slots=True)
class Provisioned:
    """What the broker needs to log in.

    Attributes:
        role_id: not a secret.
        wrapped_secret_id: a single-use wrapping token; never shown.
        changes: what was made by this run, in words; empty when all was there.
        root_certificate: PEM, of the issuer that will sign the broker's CA.
    """

    role_id: str
    wrapped_secret_id: str = field(repr=False)
    changes: tuple[str, ...]
    root_certificate: str


def provision(
    client: hvac.Client,
    *,
    trust_domain: TrustDomain,
    layout: VaultLayout | None = None,
    x509_algorithm: KeyAlgorithm = KeyAlgorithm.EC_P256,
    jwt_algorithm: KeyAlgorithm = KeyAlgorithm.EC_P256,
    root_ttl: timedelta = timedelta(days=3650),
    wrap_ttl: timedelta = timedelta(minutes=10),
) -> Provisioned:
    """Sets everything up; see the module.

    Args:
        client: logged in with a root token, or one with `provisioner_policy`.
        root_ttl: of a root made now, and the least `max_lease_ttl` of the PKI mount.
        wrap_ttl: how long the wrapped secret-id can be fetched.

    Raises:
        BackendMisconfigured: refused, or something there is not what it must be.
        BackendUnavailable: no answer.
    """
    where = layout or VaultLayout()
    changes: list[str] = []
    with _failures_named():
        _mount_engines(client, where, root_ttl, changes)
        for name, algorithm in (
            (where.x509_key, x509_algorithm),
            (where.jwt_key, jwt_algorithm),
        ):
            _make_key(client, where.transit_mount, name, algorithm, changes)
        root = _make_root(client, where, trust_domain, root_ttl, changes)
        _write_policy(client, where, changes)
        role_id = _make_role(client, where, changes)
        wrapped = client.auth.approle.generate_secret_id(
            where.role,
            mount_point=where.approle_mount,
            wrap_ttl=f"{int(wrap_ttl.total_seconds())}s",
        )
    return Provisioned(
        role_id=role_id,
        wrapped_secret_id=str(wrapped["wrap_info"]["token"]),
        changes=tuple(changes),
        root_certificate=root,
    )


def admin_client(
    address: str, token: str, *, ca_file: Path | None = None, namespace: str = ""
) -> hvac.Client:
    """An hvac client that is safe to give an administrator's token to.

    It follows no redirect, reads no environment and waits ten seconds at most.

    Raises:
        BackendMisconfigured: the address cannot be used (see `VaultSettings`).
    """
    VaultSettings(address=address, ca_file=ca_file, namespace=namespace)
    session = requests.Session()
    session.trust_env = False
    session.verify = True if ca_file is None else str(ca_file)
    return hvac.Client(
        url=address,
        token=token,
        session=session,
        timeout=10,
        allow_redirects=False,
        namespace=namespace or None,
    )


def _mount_engines(
    client: _Admin, where: VaultLayout, root_ttl: timedelta, changes: list[str]
) -> None:
    answer = client.sys.list_mounted_secrets_engines()
    if not isinstance(answer, dict):  # hvac's way to hand out a redirect that it did not follow
        raise BackendMisconfigured(
            "the OpenBao address redirects to another one",
            hint="use the address of the active node: bao status shows it",
        )
    mounted = _data(answer)
    for mount, kind in ((where.transit_mount, "transit"), (where.pki_mount, "pki")):
        found = mounted.get(f"{mount}/")
        if found is None:
            client.sys.enable_secrets_engine(kind, path=mount)
            changes.append(f"mounted {kind} at {mount}/")
        elif found["type"] != kind:
            raise BackendMisconfigured(
                f'the mount "{mount}/" is of type "{found["type"]}" and not "{kind}"',
                hint="choose another mount name",
            )
    # Without this, OpenBao cuts every lifetime to 32 days and answers 200.
    wanted = int(root_ttl.total_seconds())
    tuned = client.sys.read_mount_configuration(path=where.pki_mount)
    if int(_data(tuned).get("max_lease_ttl") or 0) < wanted:
        client.sys.tune_mount_configuration(path=where.pki_mount, max_lease_ttl=f"{wanted}s")
        changes.append(f"raised max_lease_ttl of {where.pki_mount}/ to {wanted}s")


def _make_key(
    client: _Admin, mount: str, name: str, algorithm: KeyAlgorithm, changes: list[str]
) -> None:
    wanted = TRANSIT_TYPES[algorithm]
    try:
        found = _data(client.secrets.transit.read_key(name, mount_point=mount))
    except hvac_errors.InvalidPath:
        # Written by path: hvac's list of key types is older than the server's.
        client.write_data(
            f"{mount}/keys/{name}",
            data={"type": wanted, "exportable": False, "allow_plaintext_backup": False},
        )
        changes.append(f"made Transit key {name} ({wanted})")
        # Making a key is an upsert: somebody else's, made just now, would come back as ours.
        found = _data(client.secrets.transit.read_key(name, mount_point=mount))
    wrong = [
        option
        for option in ("exportable", "allow_plaintext_backup", "deletion_allowed", "derived")
        if found.get(option) is not False
    ]
    if found.get("type") != wanted:
        wrong.append(f'type "{found.get("type")}" instead of "{wanted}"')
    if wrong:
        raise BackendMisconfigured(
            f'the Transit key "{name}" is there and cannot be a CA key: {", ".join(wrong)}',
            hint="choose another key name: --x509-key, --jwt-key",
        )


def _make_root(
    client: _Admin,
    where: VaultLayout,
    trust_domain: TrustDomain,
    root_ttl: timedelta,
    changes: list[str],
) -> str:
    try:
        found = _data(client.read(f"{where.pki_mount}/issuer/{where.issuer}/json") or {})
    except (hvac_errors.InvalidPath, hvac_errors.InvalidRequest, hvac_errors.InternalServerError):
        found = {}
    if not found:
        # A copy each time: hvac writes into the dict it is given.
        extra = {
            "issuer_name": where.issuer,
            "key_type": "ec",
            "key_bits": 384,
            "ttl": f"{int(root_ttl.total_seconds())}s",
            "uri_sans": str(trust_domain.id),
            "exclude_cn_from_sans": True,
            "organization": trust_domain.name[:64],
        }
        found = _data(
            client.secrets.pki.generate_root(
                "internal",
                f"{where.issuer} {trust_domain.name}"[:64],
                extra_params=dict(extra),
                mount_point=where.pki_mount,
            )
        )
        changes.append(f"made root {where.issuer} for {trust_domain.name}")
    pem = str(found["certificate"]).strip() + "\n"
    _require_root_of(x509.load_pem_x509_certificate(pem.encode("ascii")), where, trust_domain)
    return pem


def _require_root_of(root: x509.Certificate, where: VaultLayout, trust_domain: TrustDomain) -> None:
    try:
        names = root.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return  # an organisation's own root need not know of SPIFFE
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if uris and str(trust_domain.id) not in uris:
        raise BackendMisconfigured(
            f'the issuer "{where.issuer}" is there and is of another trust domain',
            hint="choose another issuer name or mount: --issuer, --pki-mount",
            detail=f"{uris[0][:200]} instead of {trust_domain.id}",
        )


def _write_policy(client: _Admin, where: VaultLayout, changes: list[str]) -> None:
    wanted = broker_policy(where)
    try:
        found = _data(client.sys.read_acl_policy(where.policy)).get("policy")
    except hvac_errors.InvalidPath:
        found = None
    if found != wanted:
        client.sys.create_or_update_acl_policy(where.policy, wanted)
        changes.append(f"wrote policy {where.policy}")


def _make_role(client: _Admin, where: VaultLayout, changes: list[str]) -> str:
    methods = client.sys.list_auth_methods()["data"]
    found = methods.get(f"{where.approle_mount}/")
    if found is None:
        client.sys.enable_auth_method("approle", path=where.approle_mount)
        changes.append(f"enabled approle at {where.approle_mount}/")
    elif found["type"] != "approle":
        raise BackendMisconfigured(
            f'the auth mount "{where.approle_mount}/" is of type "{found["type"]}"',
            hint="choose another one: --approle-mount",
        )
    path = f"auth/{where.approle_mount}/role/{where.role}"
    wanted: dict[str, Any] = {
        "bind_secret_id": True,
        # The broker logs in again with the same secret-id when its token reaches its end.
        "secret_id_num_uses": 0,
        "secret_id_ttl": 0,
        "token_policies": [where.policy],
        "token_no_default_policy": True,
        "token_type": "service",
        "token_ttl": 3600,
        "token_max_ttl": 86400,
    }
    try:
        role = _data(client.read(path) or {})
    except hvac_errors.InvalidPath:
        role = {}
    if any(role.get(name) != value for name, value in wanted.items()):
        client.write_data(path, data=dict(wanted))
        changes.append(f"wrote AppRole {where.role}")
    return str(
        _data(client.auth.approle.read_role_id(where.role, mount_point=where.approle_mount))[
            "role_id"
        ]
    )


def _data(answer: Any) -> Mapping[str, Any]:
    """The answer's data: hvac answers 200 with a dict and 204 with a Response."""
    found = answer.get("data") if isinstance(answer, dict) else None
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def _failures_named() -> Iterator[None]:
    try:
        yield
    except hvac_errors.Forbidden as exc:
        raise BackendMisconfigured(
            "the administrator's token may not do that",
            hint="use a token with the policy that --print-provisioner-policy shows",
            detail=str(exc)[:300],
        ) from exc
    except _UNAVAILABLE as exc:
        raise BackendUnavailable(
            "OpenBao cannot be set up now: it is sealed, busy or failing",
            hint="bao status shows its state",
            detail=str(exc)[:300],
        ) from exc
    except hvac_errors.VaultError as exc:
        raise BackendMisconfigured(
            "OpenBao refused a step of the set-up", detail=str(exc)[:300]
        ) from exc
    except requests.RequestException as exc:
        exc.request = None  # its headers carry the token
        raise BackendUnavailable(
            "OpenBao cannot be reached",
            hint="check --address and --ca-file",
            detail=type(exc).__name__,
        ) from exc


# --- the command --------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (0 done, 1 failed, 2 wrong usage)."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        layout = VaultLayout(
            transit_mount=options.transit_mount,
            x509_key=options.x509_key,
            jwt_key=options.jwt_key,
            pki_mount=options.pki_mount,
            issuer=options.issuer,
            approle_mount=options.approle_mount,
            role=options.role,
            policy=options.policy or options.role,
        )
        if options.print_policy or options.print_provisioner_policy:
            shown = provisioner_policy if options.print_provisioner_policy else broker_policy
            sys.stdout.write(shown(layout))
            return 0
        for name in ("address", "token_file", "trust_domain", "wrapped_secret_id_file"):
            if getattr(options, name) is None:
                parser.error(f"--{name.replace('_', '-')} is required")
        _run(options, layout)
    except CAError as exc:
        return _fail(exc.message, exc.hint, exc.detail)
    except OSError as exc:
        return _fail(f"cannot use {exc.filename}: {exc.strerror}", "", "")
    return 0


def _run(options: argparse.Namespace, layout: VaultLayout) -> None:
    token = options.token_file.read_text("ascii").strip()
    try:
        trust_domain = TrustDomain.parse(options.trust_domain)
    except SpiffeIdError as exc:
        raise BackendMisconfigured(exc.message, hint=exc.hint) from exc
    made = provision(
        admin_client(options.address, token, ca_file=options.ca_file, namespace=options.namespace),
        trust_domain=trust_domain,
        layout=layout,
        x509_algorithm=KeyAlgorithm(options.x509_algorithm),
        jwt_algorithm=KeyAlgorithm(options.jwt_algorithm),
        wrap_ttl=timedelta(minutes=options.wrap_minutes),
    )
    _write_private(options.wrapped_secret_id_file, made.wrapped_secret_id)
    for change in made.changes:
        sys.stderr.write(f"{change}\n")
    json.dump(
        {
            "role_id": made.role_id,
            "wrapped_secret_id_file": str(options.wrapped_secret_id_file),
            "transit_mount": layout.transit_mount,
            "pki_mount": layout.pki_mount,
            "issuer": layout.issuer,
            "changes": list(made.changes),
        },
        sys.stdout,
        indent=2,
    )
    sys.stdout.write("\n")


def _parser() -> argparse.ArgumentParser:
    layout = VaultLayout()
    parser = argparse.ArgumentParser(
        prog="python -m identity_ca.backends.vault.provision",
        description="Sets OpenBao or Vault up for one trust domain. Safe to repeat.",
    )
    add = parser.add_argument
    add("--address", help="https://host:port")
    add("--token-file", type=Path, help="file with an administrator's token")
    add("--trust-domain", help='e.g. "example.org"')
    add("--wrapped-secret-id-file", type=Path, help="written, mode 0600: the broker unwraps it")
    add("--wrap-minutes", type=int, default=10, help="how long it can be unwrapped")
    add("--ca-file", type=Path, help="PEM bundle that signed the server's certificate")
    add("--namespace", default="")
    add("--transit-mount", default=layout.transit_mount)
    add("--x509-key", default=layout.x509_key)
    add("--jwt-key", default=layout.jwt_key)
    add("--pki-mount", default=layout.pki_mount)
    add("--issuer", default=layout.issuer)
    add("--approle-mount", default=layout.approle_mount)
    add("--role", default=layout.role)
    add("--policy", help="the role's name when left out")
    kinds = [each.value for each in TRANSIT_TYPES]
    add("--x509-algorithm", choices=kinds, default=KeyAlgorithm.EC_P256.value)
    add("--jwt-algorithm", choices=kinds, default=KeyAlgorithm.EC_P256.value)
    add("--print-policy", action="store_true", help="show the broker's policy and stop")
    add("--print-provisioner-policy", action="store_true", help="show what this needs and stop")
    return parser


def _write_private(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
    draft.replace(path)


def _fail(sentence: str, hint: str, detail: str) -> int:
    sys.stderr.write(f"error: {sentence}\n")
    for label, text in (("hint", hint), ("detail", detail)):
        if text:
            sys.stderr.write(f"{label}: {text}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
