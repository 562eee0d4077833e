"""Logging in to a real OpenBao, staying logged in, and never showing a secret."""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import hvac
import pytest

from identity_ca.backends.vault.auth import (
    AppRoleAuth,
    ClientCertificateAuth,
    KubernetesAuth,
    TokenAuth,
    WrappedSecretCompromised,
)
from identity_ca.backends.vault.session import VaultRefused, VaultSession, VaultUnavailable
from identity_ca.errors import BackendMisconfigured, CAError
from support.openbao import Fault, VaultSite, make_tls_files

pytestmark = pytest.mark.openbao


def token_of(session: VaultSession) -> str | None:
    return session._keeper.current()


def eventually(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def short_site(vault_site: VaultSite, openbao_admin: hvac.Client) -> Callable[..., VaultSite]:
    """A site whose role's settings can be changed: `short_site(token_ttl=…)`."""

    def changed(**role: object) -> VaultSite:
        layout = vault_site.layout
        openbao_admin.write_data(f"auth/{layout.approle_mount}/role/{layout.role}", data=role)
        return vault_site

    return changed


def read_key(session: VaultSession, site: VaultSite) -> None:
    session.get(f"{site.layout.transit_mount}/keys/{site.layout.x509_key}")


# --- AppRole --------------------------------------------------------------------------------------


def test_a_wrapped_secret_id_is_unwrapped_once_and_used_again(
    vault_site, open_session, fault_proxy, openbao_admin
):
    session = open_session(auth=vault_site.auth(), address=fault_proxy.address)
    read_key(session, vault_site)
    first = token_of(session)
    openbao_admin.auth.token.revoke(first)
    read_key(session, vault_site)  # logs in again by itself
    assert token_of(session) != first
    assert fault_proxy.paths().count("sys/wrapping/unwrap") == 1
    assert fault_proxy.paths().count("auth/approle/login") == 2


def test_trap_a_wrapped_secret_id_that_was_unwrapped_is_compromised(
    vault_site, open_session, openbao_admin, tmp_path
):
    """3c: a failed unwrap means that somebody else has the secret."""
    auth = vault_site.auth()
    (file,) = vault_site.directory.glob("wrapped-*")
    openbao_admin.sys.unwrap(token=file.read_text())
    with pytest.raises(WrappedSecretCompromised, match="unwrapped before") as refused:
        open_session(auth=auth).get("sys/mounts")
    assert "audit log" in refused.value.hint
    assert isinstance(refused.value, BackendMisconfigured)


def test_a_swapped_wrapping_token_is_compromised(vault_site, open_session, openbao_admin):
    """Anybody may wrap; only AppRole's own wrapping says so in its creation path."""
    auth = vault_site.auth()
    (file,) = vault_site.directory.glob("wrapped-*")
    forged = openbao_admin.sys.wrap({"secret_id": "mine"}, ttl=60)
    file.write_text(forged["wrap_info"]["token"])
    with pytest.raises(WrappedSecretCompromised, match="not made by AppRole"):
        open_session(auth=auth).get("sys/mounts")


def test_a_connection_that_breaks_during_unwrapping_is_no_theft(
    vault_site, open_session, fault_proxy
):
    """Repeating it would find the token used up, and cry compromise for a network error."""
    fault_proxy.inject(Fault(match="sys/wrapping/unwrap", reset=True, times=1))
    session = open_session(auth=vault_site.auth(), address=fault_proxy.address, open_seconds=0.1)
    with pytest.raises(VaultUnavailable):
        read_key(session, vault_site)
    assert fault_proxy.paths().count("sys/wrapping/unwrap") == 1
    time.sleep(1.1)
    read_key(session, vault_site)


def test_a_secret_id_from_a_file_is_read_at_each_login(
    vault_site, open_session, openbao_admin, tmp_path
):
    layout = vault_site.layout

    def new_secret() -> str:
        made = openbao_admin.auth.approle.generate_secret_id(
            layout.role, mount_point=layout.approle_mount
        )
        return str(made["data"]["secret_id"])

    file = tmp_path / "secret-id"
    file.write_text("wrong")
    session = open_session(auth=AppRoleAuth(vault_site.provisioned.role_id, secret_id_file=file))
    with pytest.raises(BackendMisconfigured, match="refused the broker's login"):
        read_key(session, vault_site)
    file.write_text(new_secret() + "\n")
    with pytest.raises(BackendMisconfigured):  # one login a second
        read_key(session, vault_site)
    eventually(lambda: _works(lambda: read_key(session, vault_site)))


def _works(call: Callable[[], object]) -> bool:
    try:
        call()
    except CAError:
        return False
    return True


@pytest.mark.parametrize("text", ["", "  \n", "two words", "\x00\x01", "x" * 70_000, "ä"])
def test_a_secret_file_that_holds_something_else_is_not_quoted(open_session, tmp_path, text):
    file = tmp_path / "secret"
    file.write_text(text)
    with pytest.raises(BackendMisconfigured) as refused:
        open_session(auth=TokenAuth(file)).get("sys/mounts")
    assert not text.strip() or text.strip() not in str(refused.value)


def test_a_missing_secret_file_is_named(open_session, tmp_path):
    with pytest.raises(BackendMisconfigured, match="cannot be read") as refused:
        open_session(auth=TokenAuth(tmp_path / "none")).get("sys/mounts")
    assert str(tmp_path / "none") in refused.value.detail


def test_approle_needs_exactly_one_secret(tmp_path):
    for files in ({}, {"secret_id_file": tmp_path, "wrapped_secret_id_file": tmp_path}):
        with pytest.raises(BackendMisconfigured, match="not both"):
            AppRoleAuth("role", **files)


# --- staying logged in ----------------------------------------------------------------------------


def test_a_token_is_renewed_at_two_thirds_of_its_life(short_site, open_session, fault_proxy):
    site = short_site(token_ttl="2s", token_max_ttl="60s")
    session = open_session(auth=site.auth(), address=fault_proxy.address)
    read_key(session, site)
    token = token_of(session)
    eventually(lambda: "auth/token/renew-self" in fault_proxy.paths())
    began = fault_proxy.seen[0].at
    (renewed,) = [each.at for each in fault_proxy.seen if each.path.endswith("/renew-self")]
    assert 2 * (2 / 3) * 0.9 - 0.05 < renewed - began < 1.9
    time.sleep(max(0.0, began + 2.2 - time.monotonic()))
    read_key(session, site)
    assert token_of(session) == token
    assert fault_proxy.paths().count("auth/approle/login") == 1


def test_trap_the_renewal_counts_what_the_reply_says(short_site, open_session, fault_proxy):
    """3c: lookup-self may be stale on a standby; it is not asked."""
    site = short_site(token_ttl="1s", token_max_ttl="60s")

    def shorter(answer):
        answer["auth"]["lease_duration"] = 0.95
        return answer

    fault_proxy.inject(Fault(match="renew-self", rewrite=shorter))
    session = open_session(auth=site.auth(), address=fault_proxy.address)
    read_key(session, site)
    eventually(lambda: fault_proxy.paths().count("auth/token/renew-self") >= 2)
    assert "auth/token/lookup-self" not in fault_proxy.paths()
    assert session._keeper._lease.duration == 0.95


def test_a_token_that_no_longer_grows_is_replaced_before_it_ends(
    short_site, open_session, fault_proxy
):
    """The old one stays in use until the new one is there: no call fails."""
    site = short_site(token_ttl="1s", token_max_ttl="2s")
    session = open_session(auth=site.auth(), address=fault_proxy.address)
    read_key(session, site)
    first = token_of(session)
    until = time.monotonic() + 2.5
    while time.monotonic() < until:
        read_key(session, site)
        time.sleep(0.02)
    assert token_of(session) != first
    assert fault_proxy.paths().count("auth/approle/login") >= 2
    assert fault_proxy.paths().count("sys/wrapping/unwrap") == 1
    # Replaced while it was good: nobody had to find out from a 403 that it had ended.
    assert "auth/token/lookup-self" not in fault_proxy.paths()


def test_trap_a_batch_token_is_replaced_not_renewed(short_site, open_session, fault_proxy):
    """3c: no renewal, no accessor, no revocation."""
    site = short_site(token_ttl="1s", token_max_ttl="1s", token_type="batch")
    session = open_session(auth=site.auth(), address=fault_proxy.address)
    read_key(session, site)
    first = token_of(session)
    assert first is not None
    assert first.startswith("b.")
    eventually(lambda: token_of(session) != first)
    read_key(session, site)
    assert "auth/token/renew-self" not in fault_proxy.paths()


def test_a_failed_renewal_is_tried_again_while_the_token_lasts(
    short_site, open_session, fault_proxy
):
    site = short_site(token_ttl="2s", token_max_ttl="60s")
    session = open_session(auth=site.auth(), address=fault_proxy.address, open_seconds=0.05)
    read_key(session, site)
    token = token_of(session)
    fault_proxy.inject(Fault(match="renew-self", status=500, errors=("storage",), times=1))
    eventually(lambda: fault_proxy.paths().count("auth/token/renew-self") >= 2)
    eventually(lambda: _works(lambda: read_key(session, site)))
    assert token_of(session) == token


def test_a_token_that_ended_during_an_outage_is_replaced_afterwards(
    short_site, open_session, fault_proxy
):
    site = short_site(token_ttl="1s", token_max_ttl="60s")
    session = open_session(auth=site.auth(), address=fault_proxy.address, open_seconds=0.1)
    read_key(session, site)
    first = token_of(session)
    fault_proxy.stop()
    time.sleep(1.5)
    assert not _works(lambda: read_key(session, site))
    fault_proxy.start()
    eventually(lambda: _works(lambda: read_key(session, site)))
    assert token_of(session) != first


def test_trap_403_of_a_dead_token_is_not_403_of_the_policy(
    vault_site, open_session, fault_proxy, openbao_admin
):
    """The answers look alike; a live token that is denied must not lead to a login storm."""
    session = open_session(auth=vault_site.auth(), address=fault_proxy.address)
    read_key(session, vault_site)
    for _ in range(3):
        with pytest.raises(VaultRefused) as denied:
            session.get("sys/mounts")
        assert denied.value.status == 403
    assert fault_proxy.paths().count("auth/approle/login") == 1
    openbao_admin.auth.token.revoke(token_of(session))
    read_key(session, vault_site)
    assert fault_proxy.paths().count("auth/approle/login") == 2


def test_many_threads_log_in_once(vault_site, open_session, fault_proxy):
    session = open_session(auth=vault_site.auth(), address=fault_proxy.address)
    failures: list[BaseException] = []

    def use() -> None:
        try:
            read_key(session, vault_site)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=use) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert fault_proxy.paths().count("auth/approle/login") == 1


def test_closing_revokes_the_token_and_ends_the_thread(vault_site, open_session, openbao_admin):
    session = open_session(auth=vault_site.auth())
    read_key(session, vault_site)
    token = token_of(session)
    assert openbao_admin.auth.token.lookup(token)
    assert any(thread.name == "openbao-token" for thread in threading.enumerate())
    session.close()
    session.close()
    assert not any(
        thread.name == "openbao-token" and thread.is_alive() for thread in threading.enumerate()
    )
    with pytest.raises(Exception, match=r"bad token|permission denied"):
        openbao_admin.auth.token.lookup(token)
    with pytest.raises(VaultUnavailable, match="closed"):
        read_key(session, vault_site)


def test_closing_is_quick_when_the_server_is_gone(vault_site, open_session, fault_proxy):
    session = open_session(auth=vault_site.auth(), address=fault_proxy.address)
    read_key(session, vault_site)
    fault_proxy.inject(Fault(delay=5))
    began = time.monotonic()
    session.close()
    assert time.monotonic() - began < 2


def test_a_token_of_somebody_else_is_renewed_and_not_revoked(open_session, openbao_admin, tmp_path):
    made = openbao_admin.auth.token.create(policies=["default"], ttl="2s")["auth"]
    file = tmp_path / "token"
    file.write_text(made["client_token"])
    session = open_session(auth=TokenAuth(file))
    session.get("auth/token/lookup-self")
    time.sleep(2.3)
    session.get("auth/token/lookup-self")
    session.close()
    assert openbao_admin.auth.token.lookup(made["client_token"])


def test_a_token_file_that_was_refreshed_is_read_again(open_session, openbao_admin, tmp_path):
    file = tmp_path / "token"
    first, second = (
        openbao_admin.auth.token.create(policies=["default"], ttl="60s")["auth"]["client_token"]
        for _ in range(2)
    )
    file.write_text(first)
    session = open_session(auth=TokenAuth(file))
    session.get("auth/token/lookup-self")
    file.write_text(second)
    openbao_admin.auth.token.revoke(first)
    session.get("auth/token/lookup-self")
    assert token_of(session) == second


# --- Kubernetes -----------------------------------------------------------------------------------


def service_account_token(name: str) -> str:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    claims = {
        "iss": "https://kubernetes.default.svc",
        "aud": ["openbao"],
        "nbf": int(time.time()) - 5,
        "iat": int(time.time()) - 5,
        "exp": int(time.time()) + 600,
        "jti": str(time.monotonic_ns()),
        "sub": f"system:serviceaccount:identity:{name}",
        "kubernetes.io": {
            "namespace": "identity",
            "serviceaccount": {"name": name, "uid": f"uid-{name}"},
        },
    }
    return ".".join((part({"alg": "RS256", "typ": "JWT"}), part(claims), "c2lnbmF0dXJl"))


@pytest.fixture
def kubernetes_api() -> Iterator[tuple[str, list[str]]]:
    """A Kubernetes API that reviews tokens: its address, and the tokens it was shown."""
    reviewed: list[str] = []

    class Reviewer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            token = body["spec"]["token"]
            reviewed.append(token)
            claims = token.split(".")[1]
            account = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
            answer = {
                "apiVersion": "authentication.k8s.io/v1",
                "kind": "TokenReview",
                "status": {
                    "authenticated": True,
                    "audiences": ["openbao"],
                    "user": {
                        "username": account["sub"],
                        "uid": account["kubernetes.io"]["serviceaccount"]["uid"],
                        "groups": ["system:serviceaccounts"],
                    },
                },
            }
            text = json.dumps(answer).encode()
            self.send_response(201)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *arguments: object) -> None:
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Reviewer)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", reviewed
    server.shutdown()
    server.server_close()


def test_trap_the_projected_token_is_read_at_each_login(
    vault_site, open_session, openbao_admin, openbao_tls, kubernetes_api, tmp_path
):
    """3c: Kubernetes replaces it; the one read first expires."""
    address, reviewed = kubernetes_api
    mount = f"kubernetes-{vault_site.layout.role}"
    openbao_admin.sys.enable_auth_method("kubernetes", path=mount)
    openbao_admin.write_data(
        f"auth/{mount}/config",
        data={
            "kubernetes_host": address,
            "token_reviewer_jwt": service_account_token("reviewer"),
            "disable_local_ca_jwt": True,
            "kubernetes_ca_cert": openbao_tls.ca.read_text(),
        },
    )
    openbao_admin.write_data(
        f"auth/{mount}/role/broker",
        data={
            "bound_service_account_names": ["broker"],
            "bound_service_account_namespaces": ["identity"],
            "audience": "openbao",
            "token_policies": [vault_site.layout.policy],
            "token_no_default_policy": True,
        },
    )
    file = tmp_path / "token"
    first = service_account_token("broker")
    file.write_text(first)
    session = open_session(auth=KubernetesAuth("broker", token_file=file, mount=mount))
    read_key(session, vault_site)
    second = service_account_token("broker")
    assert second != first
    file.write_text(second)
    openbao_admin.auth.token.revoke(token_of(session))
    read_key(session, vault_site)
    assert reviewed == [first, second]
    file.write_text(service_account_token("somebody-else"))
    openbao_admin.auth.token.revoke(token_of(session))
    with pytest.raises(BackendMisconfigured, match='auth method "kubernetes"'):
        read_key(session, vault_site)


# --- TLS and client certificates ------------------------------------------------------------------


@pytest.fixture
def client_files(tmp_path):
    return make_tls_files(tmp_path, "broker", client=True)


def test_login_with_a_client_certificate(
    vault_site, open_session, openbao, openbao_tls, openbao_admin, client_files
):
    mount = f"cert-{vault_site.layout.role}"
    openbao_admin.sys.enable_auth_method("cert", path=mount)
    openbao_admin.write_data(
        f"auth/{mount}/certs/broker",
        data={
            "certificate": client_files.ca.read_text(),
            "allowed_common_names": ["broker"],
            "token_policies": [vault_site.layout.policy],
            "token_no_default_policy": True,
            "token_ttl": "1s",
        },
    )
    session = open_session(
        address=openbao.tls_address,
        auth=ClientCertificateAuth("broker", mount=mount),
        ca_file=openbao_tls.ca,
        client_certificate=(client_files.certificate, client_files.key),
    )
    read_key(session, vault_site)
    first = token_of(session)
    time.sleep(1.3)
    read_key(session, vault_site)
    assert token_of(session) == first  # renewed, with the same certificate
    stranger = open_session(
        address=openbao.tls_address,
        auth=ClientCertificateAuth("broker", mount=mount),
        ca_file=openbao_tls.ca,
    )
    with pytest.raises(BackendMisconfigured, match='auth method "cert"'):
        read_key(stranger, vault_site)


def test_a_server_of_another_ca_is_not_talked_to(open_session, openbao, client_files):
    """No token is sent: the failure is the handshake's."""
    session = open_session(address=openbao.tls_address, ca_file=client_files.ca)
    with pytest.raises(VaultRefused, match="TLS connection"):
        session.get("sys/mounts")
    assert session.settings.address.startswith("https")


# --- secrets stay secret --------------------------------------------------------------------------


def test_no_secret_is_ever_shown(
    vault_site, open_session, fault_proxy, openbao_admin, openbao, caplog
):
    """Every failure's text, chain of causes and log, searched for every secret in play."""
    caplog.set_level(logging.DEBUG)
    secrets = {openbao.root_token}
    texts: list[str] = []

    def attempt(call: Callable[[], object]) -> None:
        try:
            call()
        except CAError as exc:
            texts.extend(
                (repr(exc), str(exc), exc.hint, exc.detail, *traceback.format_exception(exc))
            )
            cause: BaseException | None = exc
            while cause is not None:
                texts.append(repr(vars(cause)))
                request = getattr(cause, "request", None)
                texts.append(repr(getattr(request, "headers", "")))
                cause = cause.__cause__ or cause.__context__

    auth = vault_site.auth()
    (wrapped,) = vault_site.directory.glob("wrapped-*")
    secrets.add(wrapped.read_text())
    session = open_session(auth=auth, address=fault_proxy.address, timeout=0.5, open_seconds=0.01)
    read_key(session, vault_site)
    secrets |= {token_of(session) or "", auth._unwrapped or ""}
    secrets.add(vault_site.provisioned.wrapped_secret_id)
    for fault in (
        Fault(reset=True),
        Fault(truncate=True),
        Fault(delay=0.7),
        Fault(status=500, errors=("x",)),
        Fault(status=403, errors=("permission denied",)),
        Fault(status=307, headers={"Location": "http://127.0.0.2:1/v1/x"}),
        Fault(status=200, body=b"{"),
    ):
        fault_proxy.inject(fault)
        attempt(lambda: read_key(session, vault_site))
        fault_proxy.clear()
        time.sleep(0.02)
    openbao_admin.auth.token.revoke(token_of(session))
    attempt(lambda: read_key(session, vault_site))
    secrets.add(token_of(session) or "")
    fault_proxy.stop()
    attempt(lambda: read_key(session, vault_site))
    attempt(lambda: open_session(auth=auth).get("x//y"))
    lease = session._keeper._lease
    texts += [repr(each) for each in (session, auth, lease, vault_site.provisioned, openbao)]
    texts += [f"{record.getMessage()} {vars(record)}" for record in caplog.records]
    secrets.discard("")
    assert len(secrets) >= 5
    assert len(texts) > 30
    for secret in secrets:
        assert not [text for text in texts if secret in text]
