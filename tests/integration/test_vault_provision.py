"""Provisioning: what it makes, that it may be repeated, and what it refuses to touch."""

from __future__ import annotations

import json
import stat
from datetime import timedelta

import pytest
from cryptography import x509

from identity_ca.backends.vault.policy import VaultLayout, broker_policy
from identity_ca.backends.vault.provision import admin_client, main, provision
from identity_ca.errors import BackendMisconfigured, BackendUnavailable
from identity_ca.keys import KeyAlgorithm
from identity_ca.spiffe_id import TrustDomain
from support.openbao import TRUST_DOMAIN, Fault, unique_layout

pytestmark = pytest.mark.openbao


def test_it_makes_everything_once(openbao_admin):
    layout = unique_layout()
    first = provision(
        openbao_admin,
        trust_domain=TRUST_DOMAIN,
        layout=layout,
        jwt_algorithm=KeyAlgorithm.EC_P384,
    )
    told = " / ".join(first.changes)
    for what in (
        layout.transit_mount,
        layout.pki_mount,
        "idb-x509 (ecdsa-p256)",
        "idb-jwt (ecdsa-p384)",
        "root idb-root",
        layout.policy,
        layout.role,
    ):
        assert what in told
    root = x509.load_pem_x509_certificate(first.root_certificate.encode())
    assert root.issuer == root.subject
    names = root.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://example.org"]
    key = openbao_admin.secrets.transit.read_key("idb-x509", mount_point=layout.transit_mount)
    assert key["data"]["exportable"] is False
    assert key["data"]["allow_plaintext_backup"] is False
    assert key["data"]["deletion_allowed"] is False
    again = provision(
        openbao_admin,
        trust_domain=TRUST_DOMAIN,
        layout=layout,
        jwt_algorithm=KeyAlgorithm.EC_P384,
    )
    assert again.changes == ()
    assert again.root_certificate == first.root_certificate
    assert again.wrapped_secret_id != first.wrapped_secret_id


def test_the_role_gives_a_token_that_can_be_used_again_and_nothing_more(openbao_admin, vault_site):
    layout = vault_site.layout
    secret = openbao_admin.sys.unwrap(token=vault_site.provisioned.wrapped_secret_id)["data"]
    logins = [  # secret_id_num_uses 0: the broker logs in again with it
        openbao_admin.auth.approle.login(
            vault_site.provisioned.role_id,
            secret["secret_id"],
            use_token=False,
            mount_point=layout.approle_mount,
        )["auth"]
        for _ in range(3)
    ]
    login = logins[-1]
    assert login["token_policies"] == [layout.policy]
    assert login["lease_duration"] == 3600
    assert login["renewable"] is True


def test_a_policy_that_was_changed_is_put_back(openbao_admin, vault_site):
    layout = vault_site.layout
    openbao_admin.sys.create_or_update_acl_policy(layout.policy, 'path "*" { capabilities = [] }')
    changes = provision(openbao_admin, trust_domain=TRUST_DOMAIN, layout=layout).changes
    assert changes == (f"wrote policy {layout.policy}",)
    found = openbao_admin.sys.read_acl_policy(layout.policy)["data"]["policy"]
    assert found == broker_policy(layout)


def test_the_root_of_another_trust_domain_is_not_taken(openbao_admin, vault_site):
    with pytest.raises(BackendMisconfigured, match="another trust domain"):
        provision(openbao_admin, trust_domain=TrustDomain("other.test"), layout=vault_site.layout)


def test_an_exportable_key_is_not_taken(openbao_admin):
    layout = unique_layout()
    openbao_admin.sys.enable_secrets_engine("transit", path=layout.transit_mount)
    openbao_admin.secrets.transit.create_key(
        layout.jwt_key, key_type="ecdsa-p256", exportable=True, mount_point=layout.transit_mount
    )
    with pytest.raises(BackendMisconfigured, match="exportable"):
        provision(openbao_admin, trust_domain=TRUST_DOMAIN, layout=layout)


@pytest.mark.parametrize("engine", ["transit", "pki", "approle"])
def test_a_mount_of_another_type_is_not_taken(openbao_admin, engine):
    names = {"transit_mount": "", "pki_mount": "", "approle_mount": ""}
    layout = unique_layout()
    other = f"taken-{layout.role}-{engine}"
    if engine == "approle":
        openbao_admin.sys.enable_auth_method("userpass", path=other)
    else:
        openbao_admin.sys.enable_secrets_engine("kv", path=other)
    names = {
        "transit_mount": layout.transit_mount,
        "pki_mount": layout.pki_mount,
        "role": layout.role,
        "policy": layout.policy,
        f"{engine}_mount": other,
    }
    with pytest.raises(BackendMisconfigured, match="is of type"):
        provision(openbao_admin, trust_domain=TRUST_DOMAIN, layout=VaultLayout(**names))


def test_a_token_that_may_not_is_told(openbao, openbao_admin):
    token = openbao_admin.auth.token.create(policies=["default"], ttl="60s")["auth"]
    client = admin_client(openbao.address, token["client_token"])
    with pytest.raises(BackendMisconfigured, match="may not do that") as refused:
        provision(client, trust_domain=TRUST_DOMAIN, layout=unique_layout())
    assert "--print-provisioner-policy" in refused.value.hint
    client.adapter.close()


def test_a_server_that_fails_is_told(fault_proxy, openbao):
    client = admin_client(fault_proxy.address, openbao.root_token)
    fault_proxy.inject(Fault(status=503, errors=("Vault is sealed",), times=1))
    with pytest.raises(BackendUnavailable, match="sealed"):
        provision(client, trust_domain=TRUST_DOMAIN, layout=unique_layout())
    fault_proxy.inject(Fault(reset=True))
    with pytest.raises(BackendUnavailable, match="cannot be reached") as failed:
        provision(client, trust_domain=TRUST_DOMAIN, layout=unique_layout())
    cause = failed.value.__cause__
    assert openbao.root_token not in repr(vars(cause))
    client.adapter.close()


def test_trap_the_administrators_token_follows_no_redirect(fault_proxy, openbao):
    client = admin_client(fault_proxy.address, openbao.root_token)
    fault_proxy.inject(Fault(status=307, headers={"Location": "http://127.0.0.1:1/v1/x"}))
    with pytest.raises(BackendMisconfigured, match="redirects"):
        provision(client, trust_domain=TRUST_DOMAIN, layout=unique_layout())
    assert len(fault_proxy.seen) == 1
    client.adapter.close()


def test_the_command(openbao, tmp_path, capsys):
    layout = unique_layout()
    wrapped = tmp_path / "wrapped"
    arguments = [
        "--address", openbao.address,
        "--token-file", str(openbao.root_token_file),
        "--trust-domain", "example.org",
        "--wrapped-secret-id-file", str(wrapped),
        "--transit-mount", layout.transit_mount,
        "--pki-mount", layout.pki_mount,
        "--role", layout.role,
    ]  # fmt: skip
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["role_id"]
    assert told["changes"]
    assert "made Transit key idb-x509" in err
    assert stat.S_IMODE(wrapped.stat().st_mode) == 0o600
    token = wrapped.read_text()
    assert token not in out + err
    assert openbao.root_token not in out + err
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["changes"] == []
    assert wrapped.read_text() != token


def test_the_command_tells_what_is_wrong(openbao, tmp_path, capsys):
    token = tmp_path / "token"
    token.write_text("s.wrong-and-secret")
    arguments = [
        "--address",
        openbao.address,
        "--token-file",
        str(token),
        "--trust-domain",
        "example.org",
        "--wrapped-secret-id-file",
        str(tmp_path / "w"),
    ]
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: the administrator's token may not do that\nhint: ")
    assert "wrong-and-secret" not in err
    assert main([*arguments[:3], str(tmp_path / "none"), *arguments[4:]]) == 1
    assert "No such file" in capsys.readouterr().err
    assert main([*arguments[:5], "Example.Org", *arguments[6:]]) == 1
    assert "trust domain" in capsys.readouterr().err
    assert main(["--address", "http://192.0.2.1:8200", *arguments[2:]]) == 1
    assert "plain http" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        main([])
    assert usage.value.code == 2


def test_the_wrapped_secret_id_ends(openbao_admin):
    layout = unique_layout()
    made = provision(
        openbao_admin, trust_domain=TRUST_DOMAIN, layout=layout, wrap_ttl=timedelta(seconds=90)
    )
    found = openbao_admin.write_data("sys/wrapping/lookup", data={"token": made.wrapped_secret_id})[
        "data"
    ]
    assert found["creation_ttl"] == 90
    assert made.wrapped_secret_id not in repr(made)
