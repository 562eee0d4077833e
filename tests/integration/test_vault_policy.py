"""The broker's policy is enough, and no line of it is more than enough.

Every stanza, capability and rule of the policy file is taken away once; each time something the
broker does fails, or something it must not do works.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import hvac
import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from identity_ca.authority_certificate import build_intermediate_csr
from identity_ca.backends.vault.auth import AppRoleAuth, TokenAuth
from identity_ca.backends.vault.pki import VaultPkiUpstream
from identity_ca.backends.vault.policy import VaultLayout, broker_policy, provisioner_policy
from identity_ca.backends.vault.provision import admin_client, provision
from identity_ca.backends.vault.session import (
    VaultRefused,
    VaultSession,
    VaultSettings,
    VaultUnavailable,
)
from identity_ca.backends.vault.transit import TransitKeyManager
from identity_ca.errors import CAError
from identity_ca.keys import KeyAlgorithm, LocalSigningKey, generate_private_key
from support.openbao import TRUST_DOMAIN, VaultSite, make_site, unique_layout

pytestmark = pytest.mark.openbao

DEFAULT = VaultLayout()
DEPLOY = Path(__file__).parents[2] / "deploy" / "openbao"


def stanzas(policy: str) -> list[tuple[str, str]]:
    """(path, text) of every stanza."""
    found: list[tuple[str, str]] = []
    lines: list[str] = []
    for line in policy.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        lines.append(line)
        if line.endswith("}") and not line.startswith("  "):
            path = lines[0].split('"')[1]
            found.append((path, "\n".join(lines)))
            lines = []
    assert not lines
    return found


GRANTS = [path for path, text in stanzas(broker_policy(DEFAULT)) if '"deny"' not in text]
DENIALS = [path for path, text in stanzas(broker_policy(DEFAULT)) if '"deny"' in text]


@pytest.fixture(scope="module")
def site(openbao, openbao_admin, tmp_path_factory) -> VaultSite:
    return make_site(openbao, openbao_admin, tmp_path_factory.mktemp("site"))


@dataclass(frozen=True, slots=True)
class Trial:
    """Runs the broker's work with a changed policy."""

    site: VaultSite
    secret_id_file: Path

    def local(self, path: str) -> str:
        """A path of the default layout, in this site's layout."""
        mine = self.site.layout
        for theirs, ours in (
            ("transit", mine.transit_mount),
            ("pki", mine.pki_mount),
        ):
            path = re.sub(rf"^{theirs}/", f"{ours}/", path)
        return path

    def use(self, policy: str) -> None:
        self.site.admin.sys.create_or_update_acl_policy(self.site.layout.policy, policy)

    def session(self) -> VaultSession:
        return VaultSession(
            VaultSettings(address=self.site.address, timeout=3.0),
            AppRoleAuth(
                self.site.provisioned.role_id,
                secret_id_file=self.secret_id_file,
                mount=self.site.layout.approle_mount,
            ),
        )

    def broker_works(self) -> None:
        """Everything the broker ever does with OpenBao."""
        layout = self.site.layout
        now = datetime.now(UTC)
        session = self.session()
        keys = TransitKeyManager(session, mount=layout.transit_mount)
        upstream = VaultPkiUpstream(session, mount=layout.pki_mount, issuer_ref=layout.issuer)
        try:
            keys.check()
            upstream.check()
            signing = keys.create("x509", KeyAlgorithm.EC_P256)
            upstream.certify(signing, trust_domain=TRUST_DOMAIN, ttl=timedelta(hours=1), now=now)
            jwt = keys.create("jwt", KeyAlgorithm.EC_P256)
            for key in (signing, jwt):
                keys.load(key.key_id).sign_many([b"one", b"two"])
            assert session.post("auth/token/renew-self", {})["auth"]["lease_duration"] > 0
            token = session._keeper.current()
            assert token is not None
            token_file = self.secret_id_file.with_name("token")
            token_file.write_text(token)
            with VaultSession(session.settings, TokenAuth(token_file)) as other:
                other.get(f"{layout.transit_mount}/keys/{layout.x509_key}")
        finally:
            session.close()
        assert not self.is_accepted(token)

    def is_accepted(self, token: str) -> bool:
        try:
            self.site.admin.write_data("auth/token/lookup", data={"token": token})
        except hvac.exceptions.Forbidden:
            return False
        return True


@pytest.fixture
def trial(site, tmp_path, openbao_admin):
    secret = openbao_admin.auth.approle.generate_secret_id(
        site.layout.role, mount_point=site.layout.approle_mount
    )
    file = tmp_path / "secret-id"
    file.write_text(secret["data"]["secret_id"])
    yield Trial(site, file)
    openbao_admin.sys.create_or_update_acl_policy(site.layout.policy, broker_policy(site.layout))


def without(policy: str, path: str) -> str:
    return "\n".join(text for each, text in stanzas(policy) if each != path)


def test_the_broker_works_with_exactly_this_policy(trial):
    trial.use(broker_policy(trial.site.layout))
    trial.broker_works()


@pytest.mark.parametrize("path", GRANTS)
def test_the_broker_fails_without_a_grant(trial, path):
    policy = broker_policy(trial.site.layout)
    changed = without(policy, trial.local(path))
    assert len(stanzas(changed)) == len(stanzas(policy)) - 1
    trial.use(changed)
    with pytest.raises((CAError, AssertionError)):
        trial.broker_works()


def sign_intermediate(session: VaultSession, site: VaultSite, **changes: object) -> None:
    """The broker's own request, with changes; None takes a parameter away."""
    key = LocalSigningKey("memory:x@1", generate_private_key(KeyAlgorithm.EC_P256))
    csr = build_intermediate_csr(key, trust_domain=TRUST_DOMAIN)
    body = {
        "csr": csr.public_bytes(Encoding.PEM).decode(),
        "ttl": "600s",
        "use_csr_values": True,
        "max_path_length": "0",
        "format": "pem",
    } | changes
    body = {name: value for name, value in body.items() if value is not None}
    layout = site.layout
    answer = session.post(f"{layout.pki_mount}/issuer/{layout.issuer}/sign-intermediate", body)
    assert answer["data"]["certificate"]


MUST_NOT_PASS: tuple[dict[str, object], ...] = (
    {"max_path_length": "3"},
    {"max_path_length": None},
    {"use_csr_values": None, "common_name": "ca"},
    {"use_csr_values": False, "common_name": "ca"},
    {"format": "der"},
)
SIGN_STANZA = next(text for path, text in stanzas(broker_policy(DEFAULT)) if "sign-inter" in path)
RULE_LINES = [
    line
    for line in SIGN_STANZA.splitlines()[1:-1]
    if not line.rstrip().endswith("{") and line.strip() != "}"
]

RULE_BLOCK = SIGN_STANZA[SIGN_STANZA.index("  allowed_parameters") : SIGN_STANZA.rindex("\n}")]


def passes(session: VaultSession, site: VaultSite, **changes: object) -> bool:
    try:
        sign_intermediate(session, site, **changes)
    except VaultRefused as exc:
        if exc.status != 403:
            raise
        return False
    return True


def test_the_rules_of_sign_intermediate_let_the_broker_through_and_nothing_else(trial):
    site = trial.site
    trial.use(broker_policy(site.layout))
    with trial.session() as session:
        assert passes(session, site)
        for changes in MUST_NOT_PASS:
            assert not passes(session, site, **changes), changes


@pytest.mark.parametrize("rule", [*RULE_LINES, RULE_BLOCK])
def test_no_line_of_the_rules_can_go(trial, rule):
    """Without it the broker's own request is refused, or one that must not pass does."""
    site = trial.site
    policy = broker_policy(site.layout)
    assert policy.count(rule) == 1
    trial.use(policy.replace(rule, ""))
    with trial.session() as session:
        wrong = [changes for changes in MUST_NOT_PASS if passes(session, site, **changes)]
        assert wrong or not passes(session, site)


def test_trap_an_omitted_parameter_escapes_the_policy(trial):
    """openbao.md 3a (i): without required_parameters, leaving the rule's parameter out is fine."""
    site = trial.site
    trial.use(re.sub(r"  required_parameters.*\n", "", broker_policy(site.layout)))
    with trial.session() as session:
        # Signed, although the rule on max_path_length never saw a value.
        assert passes(session, site, max_path_length=None)


def test_trap_a_number_never_matches_a_rule(trial):
    """openbao.md 3a (ii): the broker sends "0"; the number 0 is refused by the same rule."""
    site = trial.site
    trial.use(broker_policy(site.layout))
    with trial.session() as session:
        assert passes(session, site, max_path_length="0")
        assert not passes(session, site, max_path_length=0)


@pytest.mark.parametrize("parameter", ["csr", "ttl", "use_csr_values", "max_path_length"])
def test_every_constrained_parameter_is_required(trial, parameter):
    site = trial.site
    trial.use(broker_policy(site.layout))
    with trial.session() as session, pytest.raises(VaultRefused) as refused:
        sign_intermediate(session, site, **{parameter: None})
    assert refused.value.status == 403


DENIED: dict[str, Callable[[VaultLayout], tuple[str, str]]] = {
    "transit/export/*": lambda at: ("GET", f"{at.transit_mount}/export/signing-key/{at.x509_key}"),
    "transit/backup/*": lambda at: ("GET", f"{at.transit_mount}/backup/{at.x509_key}"),
    "transit/keys/+/config": lambda at: ("POST", f"{at.transit_mount}/keys/{at.x509_key}/config"),
    "pki/issuer/+/sign-self-issued": lambda at: (
        "POST",
        f"{at.pki_mount}/issuer/{at.issuer}/sign-self-issued",
    ),
    "pki/issuer/+/sign-verbatim": lambda at: (
        "POST",
        f"{at.pki_mount}/issuer/{at.issuer}/sign-verbatim",
    ),
    "pki/issuer/+/sign-verbatim/*": lambda at: (
        "POST",
        f"{at.pki_mount}/issuer/{at.issuer}/sign-verbatim/some-role",
    ),
    "pki/root/*": lambda at: ("POST", f"{at.pki_mount}/root/sign-intermediate"),
}


def test_every_denial_is_tried():
    assert sorted(DENIED) == sorted(DENIALS)


@pytest.mark.parametrize("path", DENIALS)
def test_a_denial_holds_against_a_second_policy(trial, path, openbao_admin):
    """Another policy on the token that allows everything does not allow this."""
    layout = trial.site.layout
    method, denied = DENIED[path](layout)
    policy = broker_policy(layout)

    def status_with(first: str) -> int | None:
        trial.use(first)
        with trial.session() as session:
            try:
                session.request(method, denied, body={} if method == "POST" else None)
            except (VaultRefused, VaultUnavailable) as exc:
                return exc.status
        return 200

    everything = f"everything-{layout.policy}"
    openbao_admin.sys.create_or_update_acl_policy(
        everything,
        'path "*" { capabilities = ["create", "read", "update", "delete", "list", "sudo"] }',
    )
    role = f"auth/{layout.approle_mount}/role/{layout.role}"
    openbao_admin.write_data(role, data={"token_policies": [layout.policy, everything]})
    try:
        assert status_with(policy) == 403
        assert status_with(without(policy, trial.local(path))) != 403
    finally:
        openbao_admin.write_data(role, data={"token_policies": [layout.policy]})


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "{transit}/keys/another"),
        ("GET", "{transit}/keys/another"),
        ("POST", "{transit}/sign/another"),
        ("LIST", "{transit}/keys"),
        ("DELETE", "{transit}/keys/idb-x509"),
        ("POST", "{transit}/keys/idb-x509/trim"),
        ("POST", "{pki}/issuer/another/sign-intermediate"),
        ("POST", "{pki}/revoke"),
        ("POST", "{pki}/roles/any"),
        ("GET", "sys/mounts"),
        ("POST", "auth/token/create"),
        ("GET", "sys/policies/acl/root"),
    ],
)
def test_nothing_else_is_allowed(trial, method, path):
    layout = trial.site.layout
    trial.use(broker_policy(layout))
    full = path.format(transit=layout.transit_mount, pki=layout.pki_mount)
    with trial.session() as session, pytest.raises(VaultRefused) as refused:
        session.request(method, full, body={} if method == "POST" else None)
    assert refused.value.status == 403
    assert full in refused.value.hint


@pytest.mark.parametrize(
    ("file", "rendered"),
    [("broker.hcl", broker_policy), ("provisioner.hcl", provisioner_policy)],
)
def test_the_files_in_deploy_are_the_packaged_policies(file, rendered):
    assert (DEPLOY / file).read_text() == rendered(DEFAULT), (
        "run: python -m identity_ca.backends.vault.provision --print-policy "
        "(or --print-provisioner-policy) > deploy/openbao/" + file
    )


def test_provisioning_works_with_exactly_its_policy(openbao, openbao_admin):
    layout = unique_layout()
    openbao_admin.sys.create_or_update_acl_policy("provisioner", provisioner_policy(layout))
    token = openbao_admin.auth.token.create(policies=["provisioner"], no_default_policy=True)
    client = admin_client(openbao.address, token["auth"]["client_token"])
    first = provision(client, trust_domain=TRUST_DOMAIN, layout=layout)
    assert len(first.changes) >= 7
    again = provision(client, trust_domain=TRUST_DOMAIN, layout=layout)
    assert again.changes == ()
    assert again.role_id == first.role_id
    assert again.root_certificate == first.root_certificate
    client.adapter.close()
