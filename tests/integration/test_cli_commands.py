"""`idb` against a running broker: what each command answers, refuses and ends with."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from identity_broker.cli.main import run
from identity_broker.dev.state import AgentAddresses
from support.broker import DevBroker, Ran, run_idb

Idb = Callable[..., Ran]


@pytest.fixture
def idb(dev_broker: DevBroker, capsys: pytest.CaptureFixture[str]) -> Idb:
    """`idb --dir DIR …` in this process: the same `run`, a second faster."""

    def call(*arguments: str) -> Ran:
        capsys.readouterr()
        code = run(["--dir", str(dev_broker.directory), *arguments])
        told = capsys.readouterr()
        return Ran(code, told.out, told.err)

    return call


@pytest.fixture
def entry(idb: Idb, dev_broker: DevBroker) -> dict[str, object]:
    name = dev_broker.unique("entry")
    made = idb(
        *("entry", "create", "--id", name, "--spiffe-id", f"/tests/{name}"),
        *("--parent", name, "--selector", "unix:uid:1", "-o", "json"),
    )
    assert made.code == 0, made.err
    return dict(made.json)


# --- entries ----------------------------------------------------------------------------------


def test_an_entry_from_its_creation_to_its_end(idb: Idb, dev_broker: DevBroker) -> None:
    name = dev_broker.unique("life")
    made = idb(
        *("entry", "create", "--id", name, "--spiffe-id", f"/tests/{name}", "--parent", name),
        *("--selector", "unix:uid:1000", "--selector", "unix:gid:7", "--ttl", "15m"),
        *("--jwt-ttl", "1m", "--dns", f"{name}.example.org", "--hint", "main", "--owner", "team"),
        *("--federates-with", "other.example", "--expires-in", "1d", "--label", "env=test"),
        *("--admin", "-o", "json"),
    )
    assert made.code == 0, made.err
    found = made.json
    assert found["spiffe_id"] == f"spiffe://dev.example.org/tests/{name}"
    assert found["parent_id"] == f"spiffe://dev.example.org/idb/node/join_token/{name}"
    assert found["selectors"] == ["unix:gid:7", "unix:uid:1000"]
    assert (found["x509_ttl_seconds"], found["jwt_ttl_seconds"]) == (900, 60)
    assert found["labels"] == {"env": "test"}
    assert found["admin"] is True
    left = datetime.fromisoformat(found["expires_at"]) - datetime.now(UTC)
    assert 86_000 < left.total_seconds() <= 86_400
    assert found == idb("entry", "show", name, "-o", "json").json

    listed = idb("entry", "list", "--spiffe-id", f"/tests/{name}", "-o", "json").json
    assert listed == {"entries": [found]}
    assert f"/tests/{name}" in idb("entry", "list", "--parent", name).out

    changed = idb(
        *("entry", "update", name, "--ttl", "0s", "--no-admin", "--disable", "-o", "json"),
        *("--revision", str(found["revision"])),
    ).json
    assert changed["x509_ttl_seconds"] is None
    assert (changed["admin"], changed["disabled"]) == (False, True)
    assert changed["hint"] == "main"
    assert changed["revision"] > found["revision"]
    assert "disabled" in idb("entry", "show", name).out

    deleted = idb("entry", "delete", name)
    assert (deleted.code, deleted.out) == (0, f"{name}\n")
    assert idb("entry", "show", name).code == 4


def test_an_entry_asks_for_a_process_and_a_key(idb: Idb, dev_broker: DevBroker) -> None:
    name = dev_broker.unique("keys")
    made = idb(
        *("entry", "create", "--id", name, "--spiffe-id", f"/tests/{name}", "--parent", name),
        *("--selector", "unix:uid:1", "--per-process", "--key-type", "ec-p384", "-o", "json"),
    )
    assert made.code == 0, made.err
    assert (made.json["per_process"], made.json["key_algorithm"]) == (True, "ec-p384")
    shown = idb("entry", "show", name).out
    assert "per process" in shown
    assert "ec-p384" in shown
    changed = idb(
        *("entry", "update", name, "--no-per-process", "--key-type", "rsa-2048", "-o", "json")
    ).json
    assert (changed["per_process"], changed["key_algorithm"]) == (False, "rsa-2048")
    kept = idb("entry", "update", name, "--owner", "team", "-o", "json").json
    assert (kept["per_process"], kept["key_algorithm"]) == (False, "rsa-2048")
    assert idb("entry", "update", name, "--key-type", "rsa-1024").code == 2


@pytest.mark.parametrize(
    ("selectors", "open_to_all"),
    [
        (["unix:path:/usr/bin/orders"], True),
        (["unix:path:/usr/bin/orders", f"unix:sha256:{'a' * 64}"], True),
        (["unix:path:/usr/bin/orders", "unix:uid:1000"], False),
        (["unix:uid:1000"], False),
        (["unix:path:/usr/bin/orders", "systemd:id:orders.service"], False),
    ],
)
def test_an_entry_that_any_user_fits_is_told_of(
    idb: Idb, dev_broker: DevBroker, selectors: list[str], *, open_to_all: bool
) -> None:
    name = dev_broker.unique("open")
    create = ["entry", "create", "--spiffe-id", f"/tests/{name}", "--parent", name]
    for selector in selectors:
        create += ["--selector", selector]
    made = idb(*create, "--id", name)
    assert made.code == 0, made.err
    assert (f"hint: {name}: any local user" in made.err) == open_to_all
    assert ("unix:uid as well" in made.err) == open_to_all
    assert "hint:" not in made.out
    assert idb("entry", "delete", name).code == 0
    quiet = idb(*create, "--id", name, "-o", "json")
    assert (quiet.json["id"], quiet.err) == (name, "")


def test_a_listed_entry_with_a_key_can_be_created_again(
    idb: Idb, dev_broker: DevBroker, tmp_path: Path
) -> None:
    name = dev_broker.unique("again")
    created = idb(
        *("entry", "create", "--id", name, "--spiffe-id", f"/tests/{name}", "--parent", name),
        *("--selector", "unix:uid:1", "--per-process", "--key-type", "ec-p256"),
    )
    assert created.code == 0, created.err
    listed = idb("entry", "list", "--spiffe-id", f"/tests/{name}", "-o", "json")
    file = tmp_path / "entries.json"
    file.write_text(listed.out)
    assert idb("entry", "delete", name).code == 0
    assert idb("entry", "create", "--file", str(file)).code == 0
    found = idb("entry", "show", name, "-o", "json").json
    assert (found["per_process"], found["key_algorithm"]) == (True, "ec-p256")


@pytest.mark.parametrize(
    ("selector", "hint"),
    [
        ("unix:uuid:1000", 'did you mean "unix:uid:1000"?'),
        ("systemd:id:orders", 'did you mean "systemd:id:orders.service"?'),
        ("k8s:ns:default", "entries.selector_types"),
    ],
)
def test_a_selector_nobody_vouches_for(
    idb: Idb, dev_broker: DevBroker, selector: str, hint: str
) -> None:
    name = dev_broker.unique("slip")
    refused = idb(
        *("entry", "create", "--id", name, "--spiffe-id", f"/tests/{name}", "--parent", name),
        *("--selector", selector, "-o", "json"),
    )
    assert refused.code == 2
    assert refused.error["reason"] == "ENTRY_INVALID"
    assert hint in refused.error["hint"]


def test_the_parent_may_be_left_out_where_idb_dev_runs_an_agent(
    dev_broker: DevBroker, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name = dev_broker.unique("agent")
    node = f"spiffe://dev.example.org/idb/node/join_token/{name}"
    agent = AgentAddresses(admin_socket=str(tmp_path / "agent.sock"), node_id=node)
    replace(dev_broker.state, workload_api="unix:///none", agent=agent).write(tmp_path)
    described = [
        *("entry", "create", "--spiffe-id", f"/tests/{name}", "--selector", "unix:uid:1"),
        *("-o", "json"),
    ]
    assert run(["--dir", str(tmp_path), *described]) == 0
    assert json.loads(capsys.readouterr().out)["parent_id"] == node
    # What is named wins, and another broker has no such agent.
    assert run(["--dir", str(tmp_path), *described, "--parent", "other"]) == 0
    assert json.loads(capsys.readouterr().out)["parent_id"].endswith("/join_token/other")
    assert run(["--socket", dev_broker.state.broker.admin_socket, *described]) == 2
    assert "an entry needs --parent" in capsys.readouterr().err


def test_stale_update(idb: Idb, entry: dict[str, object]) -> None:
    name = str(entry["id"])
    assert idb("entry", "update", name, "--hint", "a").code == 0
    stale = idb("entry", "update", name, "--hint", "b", "--revision", str(entry["revision"]))
    assert stale.code == 5
    assert "reason: STALE_WRITE" in stale.err
    assert idb("entry", "show", name, "-o", "json").json["hint"] == "a"


def test_duplicates_conflict(idb: Idb, entry: dict[str, object]) -> None:
    again = idb(
        *("entry", "create", "--spiffe-id", str(entry["spiffe_id"]), "-o", "json"),
        *("--parent", str(entry["parent_id"]), "--selector", "unix:uid:1"),
    )
    assert again.code == 5
    assert again.out == ""
    assert again.error["reason"] == "ENTRY_EXISTS"
    assert again.error["hint"]


def test_two_spellings_of_one_name_conflict(idb: Idb, entry: dict[str, object]) -> None:
    shouted = str(entry["spiffe_id"]).replace("/tests/", "/TESTS/")
    refused = idb(
        *("entry", "create", "--spiffe-id", shouted, "--parent", "n", "--selector", "unix:uid:1")
    )
    assert refused.code == 5
    assert "reason: SPIFFE_ID_CASE_CONFLICT" in refused.err


@pytest.mark.parametrize(
    "spiffe_id",
    [
        "spiffe://dev.example.org/a/../b",
        "/a/%2e%2e/b",
        "/a//b",
        "/a/",
        "spiffe://DEV.example.org/a",
        "SPIFFE://dev.example.org/a",
        "https://dev.example.org/a",
        "spiffe://dev.example.org/a?x=1",
        "spiffe://dev.example.org/a b",
        f"/{'a' * 2100}",
        "not-an-id",
    ],
    ids=lambda text: text[:32],
)
def test_path_tricks(idb: Idb, dev_broker: DevBroker, spiffe_id: str) -> None:
    name = dev_broker.unique("trick")
    refused = idb(
        *("entry", "create", "--id", name, "--spiffe-id", spiffe_id, "--parent", name),
        *("--selector", "unix:uid:1"),
    )
    assert refused.code == 2
    assert refused.out == ""
    assert "reason: SPIFFE_ID_INVALID" in refused.err
    assert idb("entry", "show", name).code == 4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--spiffe-id", "spiffe://other.example/a"], "ENTRY_INVALID"),
        (["--spiffe-id", "/idb/broker"], "ENTRY_INVALID"),
        (["--selector", "no-colon"], "ENTRY_INVALID"),
        (["--selector", "UPPER:x"], "ENTRY_INVALID"),
        (["--ttl", "1s"], "ENTRY_INVALID"),
        (["--ttl", "999999d"], "ENTRY_INVALID"),
        (["--dns", "UPPER.example"], "ENTRY_INVALID"),
        (["--federates-with", "dev.example.org"], "ENTRY_INVALID"),
        (["--id", "has spaces"], "ENTRY_INVALID"),
        (["--label", "novalue"], "USAGE"),
        (["--expires-in", "999999d999999h"], None),
        (["--admin", "--parent", "broker"], "ENTRY_INVALID"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_entries_that_cannot_be(
    idb: Idb, dev_broker: DevBroker, options: list[str], reason: str | None
) -> None:
    name = dev_broker.unique("bad")
    arguments = ["--spiffe-id", f"/tests/{name}", "--parent", name, "--selector", "unix:uid:1"]
    refused = idb("entry", "create", *arguments, *options)
    if reason is None:
        assert refused.code in (0, 2)
        return
    assert refused.code == 2, refused.err
    assert f"reason: {reason}" in refused.err
    assert refused.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["entry", "create", "--selector", "unix:uid:1"],
        ["entry", "create", "--spiffe-id", "/a"],
        ["entry", "create", "--file", "x.json", "--hint", "y"],
        ["entry", "update", "e-1"],
        ["revoke", "--yes"],
        ["revoke", "--serial", "abc", "--spiffe-id", "/a"],
        ["revoke", "--spiffe-id", "/a", "--no-hold", "--hold", "x"],
        ["revoke", "--spiffe-id", "/a", "--no-hold", "--hold-until", "8h"],
        ["revoke", "--spiffe-id", "/a", "--no-hold", "--reason", "certificate-hold"],
        ["revoke", "--spiffe-id", "/a", "list"],
        ["revoke", "--yes", "status", "rev-1"],
        ["compromised"],
        ["compromised", "--key", "none", "--fingerprint", "ab"],
        ["--address", "127.0.0.1:1", "entry", "list"],
    ],
    ids=" ".join,
)
def test_commands_that_make_no_sense(idb: Idb, arguments: list[str]) -> None:
    refused = idb(*arguments)
    assert refused.code == 2
    assert "reason: USAGE" in refused.err
    assert "hint: " in refused.err


def test_a_batch_is_told_item_by_item(idb: Idb, dev_broker: DevBroker, tmp_path: Path) -> None:
    good, bad = dev_broker.unique("good"), dev_broker.unique("bad")
    items: list[dict[str, object]] = [
        {"id": good, "spiffe_id": f"spiffe://dev.example.org/tests/{good}"},
        {"id": bad, "spiffe_id": "spiffe://dev.example.org/tests/../x"},
    ]
    for item in items:
        item |= {
            "parent_id": "spiffe://dev.example.org/idb/node/join_token/n",
            "selectors": ["unix:uid:1"],
        }
    file = tmp_path / "entries.json"
    file.write_text(json.dumps(items))
    done = idb("entry", "create", "--file", str(file), "-o", "json")
    assert done.code == 2
    assert [one["id"] for one in done.json["entries"]] == [good]
    assert done.error["reason"] == "SPIFFE_ID_INVALID"
    assert bad in done.error["message"]
    assert idb("entry", "delete", good, "missing").code == 4
    assert idb("entry", "show", good).code == 4


# --- things that are not there ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["entry", "show", "missing"], "ENTRY_NOT_FOUND"),
        (["entry", "update", "missing", "--hint", "x"], "ENTRY_NOT_FOUND"),
        (["entry", "delete", "missing"], "ENTRY_NOT_FOUND"),
        (["node", "show", "missing"], "NODE_NOT_FOUND"),
        (["node", "ban", "missing"], "NODE_NOT_FOUND"),
        (["node", "evict", "x509_pop/missing"], "NODE_NOT_FOUND"),
        (["credential", "show", "00" * 20], "CREDENTIAL_NOT_FOUND"),
        (["revoke", "--serial", "00" * 20, "--yes"], "SUBJECT_NOT_FOUND"),
        (["revoke", "--jti", "missing", "--plan"], "SUBJECT_NOT_FOUND"),
        (["revoke", "--spiffe-id", "/missing", "--plan"], "SUBJECT_NOT_FOUND"),
        (["revoke", "status", "missing"], "REVOCATION_NOT_FOUND"),
        (["hold", "lift", "missing", "--yes"], "HOLD_NOT_FOUND"),
        (["authority", "show", "missing"], "AUTHORITY_NOT_FOUND"),
        (["explain", "missing", "--node", "missing"], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_not_found(idb: Idb, arguments: list[str], reason: str | None) -> None:
    refused = idb(*arguments)
    assert refused.code == 4, refused.err
    assert "hint: idb" in refused.err
    if reason:
        assert f"reason: {reason}" in refused.err


# --- tokens, nodes, SVIDs, the ledger -----------------------------------------------------------


def test_a_token_is_printed_once_and_alone(idb: Idb, dev_broker: DevBroker) -> None:
    name = dev_broker.unique("web")
    made = idb("token", "generate", "--node", name, "--ttl", "5m")
    assert made.code == 0
    assert made.out.startswith("idbt_")
    assert len(made.out.splitlines()) == 1
    assert made.out.strip() not in made.err
    assert f"/idb/node/join_token/{name}" in made.err


def test_a_written_token_is_not_printed(idb: Idb, tmp_path: Path) -> None:
    file = tmp_path / "token"
    made = idb("token", "generate", "--write", str(file), "-o", "json")
    assert made.code == 0
    token = file.read_text().strip()
    assert token.startswith("idbt_")
    assert token not in made.out + made.err
    assert made.json["token"] is None
    assert made.json["file"] == str(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("options", [["--ttl", "2d"], ["--node", "a/../b"], ["--node", "ä"]])
def test_tokens_that_cannot_be(idb: Idb, options: list[str]) -> None:
    refused = idb("token", "generate", *options)
    assert refused.code == 2
    assert refused.out == ""


def test_from_token_to_revocation(idb: Idb, dev_broker: DevBroker, tmp_path: Path) -> None:
    node, entry_id = dev_broker.unique("node"), dev_broker.unique("orders")
    token, svids = tmp_path / "token", tmp_path / "svids"
    assert idb("token", "generate", "--node", node, "--write", str(token)).code == 0
    created = idb(
        *("entry", "create", "--id", entry_id, "--spiffe-id", f"/tests/{entry_id}"),
        *("--parent", node, "--selector", "unix:uid:1"),
    )
    assert created.code == 0
    spiffe_id = f"spiffe://dev.example.org/tests/{entry_id}"

    fetch = ["svid", "fetch", "--token-file", str(token), "--spiffe-id", f"/tests/{entry_id}"]
    fetched = idb(*fetch, "--write", str(svids), "-o", "json")
    assert fetched.code == 0, fetched.err
    assert fetched.json["spiffe_id"] == spiffe_id
    assert stat.S_IMODE((svids / "key.pem").stat().st_mode) == 0o600
    assert "PRIVATE KEY" not in fetched.out + fetched.err

    again = idb(*fetch)
    assert again.code == 3
    assert "reason: JOIN_TOKEN_REJECTED" in again.err
    assert token.read_text().strip() not in again.err

    shown = idb("svid", "show", str(svids / "svid.pem"), "-o", "json").json["certificates"][0]
    assert shown["spiffe_ids"] == [spiffe_id]
    assert shown["serial"] == fetched.json["serial"]
    assert spiffe_id in idb("svid", "show", str(svids / "svid.pem")).out
    verify = ["svid", "verify", str(svids / "svid.pem"), "--bundle"]
    verified = idb(*verify, str(svids / "bundle.pem"))
    assert (verified.code, verified.out) == (0, f"{spiffe_id}\n")
    other = idb(*verify, str(svids / "svid.pem"))
    assert other.code in (2, 3)

    nodes = idb("node", "list", "-o", "json").json["nodes"]
    assert f"spiffe://dev.example.org/idb/node/join_token/{node}" in [n["spiffe_id"] for n in nodes]
    explained = idb("explain", f"/tests/{entry_id}", "--node", node)
    assert explained.code == 0
    assert "would be issued" in explained.out

    serial = fetched.json["serial"]
    assert idb("credential", "show", serial, "-o", "json").json["state"] == "issued"
    revoked = idb(
        *("revoke", "--spiffe-id", f"/tests/{entry_id}", "-o", "json", "--yes"),
        *("--reason", "key-compromise", "--comment", "a test"),
    )
    assert revoked.code == 0, revoked.err
    assert serial in revoked.json["revoked_ids"]
    assert revoked.json["revocation"]["held_entry_ids"] == [entry_id]
    row = idb("credential", "show", serial, "-o", "json").json
    assert (row["state"], row["reason"], row["comment"]) == ("revoked", "key-compromise", "a test")
    listed = idb("credential", "list", "--spiffe-id", f"/tests/{entry_id}", "--state", "revoked")
    assert serial in listed.out
    denied = idb("explain", entry_id, "--node", node)
    assert denied.code == 3
    assert "✗" in denied.out
    assert "reason: CHECK_FAILED" in denied.err

    banned = idb("node", "ban", node, "--reason", "a test", "-o", "json").json
    assert banned["node"]["banned"] is True
    assert "a test" in idb("node", "show", node).out
    assert idb("node", "evict", node).code == 0
    assert idb("node", "show", node).code == 4


def test_an_administrator_from_elsewhere(idb: Idb, dev_broker: DevBroker, tmp_path: Path) -> None:
    node = dev_broker.unique("ops")
    token = tmp_path / "token"
    assert idb("token", "generate", "--node", node, "--write", str(token)).code == 0
    made = idb(
        *("entry", "create", "--spiffe-id", f"/tests/{node}", "--parent", node, "--admin"),
        *("--selector", "unix:uid:1"),
    )
    assert made.code == 0
    fetched = idb(
        *("svid", "fetch", "--token-file", str(token), "--spiffe-id", f"/tests/{node}"),
        *("--write", str(tmp_path)),
    )
    assert fetched.code == 0, fetched.err
    remote = [
        *("--address", dev_broker.state.broker.address, "--cert", str(tmp_path / "svid.pem")),
        *("--key", str(tmp_path / "key.pem"), "--bundle", str(tmp_path / "bundle.pem")),
    ]
    listed = idb(*remote, "node", "show", node, "-o", "json")
    assert listed.code == 0, listed.err
    assert idb("entry", "update", made.out.split()[1], "--no-admin").code == 0
    denied = idb(*remote, "node", "show", node, "-o", "json")
    assert denied.code == 3
    assert denied.error["reason"] == "METHOD_DENIED"
    broken = idb(*remote, "--key", str(tmp_path / "none"), "node", "list")
    assert broken.code == 2


def test_authorities_and_bundle(idb: Idb) -> None:
    authorities = idb("authority", "list", "-o", "json").json["authorities"]
    assert {one["kind"] for one in authorities if one["state"] == "active"} == {"x509", "jwt"}
    one = idb("authority", "show", authorities[0]["id"])
    assert "BEGIN CERTIFICATE" in one.out
    assert "BEGIN CERTIFICATE" in idb("bundle", "show", "--format", "pem").out
    spiffe = json.loads(idb("bundle", "show", "--format", "spiffe").out)
    assert {key["use"] for key in spiffe["keys"]} == {"x509-svid", "jwt-svid"}
    assert json.loads(idb("bundle", "show", "--format", "jwks").out)["keys"]
    assert idb("bundle", "show", "-o", "json").json["trust_domain"] == "dev.example.org"
    assert "trust domain" in idb("bundle", "show").out


def test_the_doctor_finds_a_healthy_broker(idb: Idb) -> None:
    found = idb("doctor", "-o", "json")
    assert found.code == 0, found.out
    assert found.json["verdict"] == "ok", found.out
    checks = {one["check"] for one in found.json["findings"]}
    assert {"admin socket", "store", "signing_backend", "clock", "x509 authority"} <= checks


# --- a broker that is not there -----------------------------------------------------------------


def test_a_broker_that_is_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a-file").touch()
    for arguments, code in (
        (["--socket", str(tmp_path / "none.sock"), "entry", "list"], 6),
        (["--dir", str(tmp_path), "entry", "list"], 6),
        (["--socket", str(tmp_path / "a-file"), "entry", "list"], 2),
        (["--socket", f"/{'x' * 200}", "entry", "list"], 2),
        (["--dir", str(tmp_path), "doctor"], 6),
        (["--socket", str(tmp_path / "none.sock"), "doctor"], 6),
    ):
        assert run(arguments) == code, arguments
        assert "error: " in capsys.readouterr().err


def test_a_real_process_with_a_pipe_that_closes(dev_broker: DevBroker, tmp_path: Path) -> None:
    listed = run_idb("entry", "list", env={"IDB_DIR": str(dev_broker.directory)}, cwd=tmp_path)
    assert listed.code == 0, listed.err
    socket = dev_broker.state.broker.admin_socket
    env = {"IDB_ADMIN_SOCKET": socket}
    assert run_idb("authority", "list", env=env, cwd=tmp_path).code == 0


def test_standard_input_as_a_file(dev_broker: DevBroker) -> None:
    name = dev_broker.unique("stdin")
    item = {
        "spiffe_id": f"spiffe://dev.example.org/tests/{name}",
        "parent_id": "spiffe://dev.example.org/idb/broker",
        "selectors": ["join_token:name:x"],
    }
    done = dev_broker.idb("entry", "create", "--file", "-", "-o", "json", stdin=json.dumps([item]))
    assert done.code == 0, done.err
    assert done.json["parent_id"] == item["parent_id"]
