"""The broker's policies, rendered for the mounts and names in use.

- One source: the `.hcl` templates in `policies/`. `deploy/openbao/` holds them rendered with the
  default names, and a test keeps the two the same.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib.resources import files
from string import Template

from identity_ca.backends.vault.wire import checked_path

__all__ = ["VaultLayout", "broker_policy", "provisioner_policy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VaultLayout:
    """Where everything of one trust domain is on the server.

    Raises:
        BackendMisconfigured: a name that cannot be part of a path.
    """

    transit_mount: str = "transit"
    x509_key: str = "idb-x509"
    jwt_key: str = "idb-jwt"
    pki_mount: str = "pki"
    issuer: str = "idb-root"
    approle_mount: str = "approle"
    role: str = "idb-broker"
    policy: str = "idb-broker"

    def __post_init__(self) -> None:
        for each in fields(self):
            checked_path(getattr(self, each.name))


def broker_policy(layout: VaultLayout) -> str:
    """HCL of what the running broker may do."""
    return _rendered("broker.hcl", layout)


def provisioner_policy(layout: VaultLayout) -> str:
    """HCL of what `provision` needs, for an administrator who does not want to use a root token."""
    return _rendered("provisioner.hcl", layout)


def _rendered(name: str, layout: VaultLayout) -> str:
    template = files("identity_ca.backends.vault").joinpath("policies", name).read_text("utf-8")
    return Template(template).substitute(
        {each.name: getattr(layout, each.name) for each in fields(layout)}
    )
