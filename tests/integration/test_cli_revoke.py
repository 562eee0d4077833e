"""`idb revoke`, `idb hold`, `idb compromised` against a running broker."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from identity_api.broker.v1 import revocation_feed_pb2 as feed_pb
from identity_api.broker.v1 import revocation_feed_pb2_grpc
from identity_api.broker.v1 import revocation_pb2 as revocation_pb
from identity_broker.cli.main import run
from support.broker import DevBroker, Ran
from support.losing import GET, REVOKE, Lost, losing_answers, relaying

Idb = Callable[..., Ran]


@pytest.fixture
def idb(dev_broker: DevBroker, capsys: pytest.CaptureFixture[str]) -> Idb:
    """`idb --dir DIR …` in this process: the same `run`, a second faster; no terminal."""

    def call(*arguments: str) -> Ran:
        capsys.readouterr()
        code = run(["--dir", str(dev_broker.directory), *arguments])
        told = capsys.readouterr()
        return Ran(code, told.out, told.err)

    return call


@dataclass(frozen=True)
class Issued:
    """A workload with an SVID."""

    entry_id: str
    path: str
    spiffe_id: str
    node: str
    serial: str
    directory: Path
    state: Path

    @property
    def certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificates((self.directory / "svid.pem").read_bytes())[0]


@pytest.fixture
def issued(idb: Idb, dev_broker: DevBroker, tmp_path: Path) -> Issued:
    name = dev_broker.unique("revoke")
    token, directory, state = tmp_path / "token", tmp_path / "svids", tmp_path / "state"
    assert idb("token", "generate", "--node", name, "--write", str(token)).code == 0
    made = idb(
        *("entry", "create", "--id", name, "--spiffe-id", f"/tests/{name}", "--parent", name),
        *("--selector", "unix:uid:1", "--owner", name),
    )
    assert made.code == 0, made.err
    fetched = idb(
        *("svid", "fetch", "--token-file", str(token), "--spiffe-id", f"/tests/{name}"),
        *("--write", str(directory), "--state-dir", str(state), "-o", "json"),
    )
    assert fetched.code == 0, fetched.err
    spiffe_id = f"spiffe://dev.example.org/tests/{name}"
    serial = fetched.json["serial"]
    return Issued(name, f"/tests/{name}", spiffe_id, name, serial, directory, state)


def again(idb: Idb, one: Issued) -> Ran:
    """Fetch the identity's next SVID as the same node."""
    fetch = ["svid", "fetch", "--state-dir", str(one.state), "--spiffe-id", one.path]
    return idb(*fetch, "--timeout", "3")


def state_of(idb: Idb, serial: str) -> str:
    return str(idb("credential", "show", serial, "-o", "json").json["state"])


@contextmanager
def verifier(dev_broker: DevBroker, name: str, *, acknowledges: bool = True) -> Iterator[None]:
    """A verifier that follows the feed by the admin socket."""
    said: SimpleQueue[feed_pb.FollowRequest | None] = SimpleQueue()
    said.put(feed_pb.FollowRequest(hello=feed_pb.FollowRequest.Hello(name=name)))
    here = threading.Event()
    socket = dev_broker.state.broker.admin_socket
    options = [("grpc.default_authority", "localhost")]
    with grpc.insecure_channel(f"unix:{socket}", options=options) as channel:
        stub = revocation_feed_pb2_grpc.RevocationFeedStub(channel)
        call = stub.Follow(iter(said.get, None))

        def follow() -> None:
            with contextlib.suppress(grpc.RpcError):
                for message in call:
                    # One that falls silent has heard of what was revoked before.
                    if acknowledges or not here.is_set():
                        ack = feed_pb.FollowRequest.Ack(sequence=message.sequence)
                        said.put(feed_pb.FollowRequest(ack=ack))
                    if message.complete:
                        here.set()

        thread = threading.Thread(target=follow)
        thread.start()
        try:
            assert here.wait(10)
            yield
        finally:
            said.put(None)
            call.cancel()
            thread.join(10)


# --- one identity -----------------------------------------------------------------------------


def test_an_identity_from_the_plan_to_the_proof(
    idb: Idb, dev_broker: DevBroker, issued: Issued, tmp_path: Path
) -> None:
    name = dev_broker.unique("verifier")
    subject = ["revoke", "--spiffe-id", issued.path]
    planned = idb(*subject, "--plan")
    assert planned.code == 0, planned.err
    assert f"spiffe-id={issued.spiffe_id}" in planned.out
    assert "1 (1 X.509-SVID, 0 JWT-SVIDs)" in planned.out
    assert "not known to the broker" in planned.out
    assert state_of(idb, issued.serial) == "issued"

    with verifier(dev_broker, name):
        done = idb(*subject, "--reason", "key-compromise", "--comment", "a test", "--yes")
        assert done.code == 0, done.err
        assert re.search(r"revoked: 1 credential, durable after \d+ ms: rev-[0-9a-f]{16}", done.err)
        assert re.search(r"(\d+) of \1 verifiers? acknowledged, p50 \d+ ms, p99 \d+ ms", done.err)
        # The plan came first.
        assert done.err.index("live credentials") < done.err.index("revoked:")
        revocation_id = done.out.split()[1]
        assert f"idb revoke status {revocation_id}" in done.err

        row = idb("credential", "show", issued.serial, "-o", "json").json
        assert (row["state"], row["reason"]) == ("revoked", "key-compromise")
        assert (row["comment"], row["revocation_id"]) == ("a test", revocation_id)
        assert revocation_id in idb("credential", "show", issued.serial).out
        listed = idb("credential", "list", "--spiffe-id", issued.path)
        assert "REVOCATION" in listed.out
        assert revocation_id in listed.out
        assert f"held by {revocation_id}" in idb("entry", "show", issued.entry_id).out
        assert again(idb, issued).code != 0

        proof = tmp_path / "proof.json"
        status = idb("revoke", "status", revocation_id, "--wait", "20s", "--statement", str(proof))
        assert status.code == 0, status.err
        assert f"({name})" in status.out
        found = idb("revoke", "status", revocation_id, "-o", "json").json
        assert found["revocation"]["state"] == "closed"
        assert found["propagation"]["silent"] == 0
        heard = [
            one for one in found["propagation"]["verifiers"] if one["name"].endswith(f"({name})")
        ]
        assert [one["state"] for one in heard] == ["acknowledged"]
        assert 0 <= heard[0]["latency_ms"] < 5000

    bundle = tmp_path / "bundle.json"
    bundle.write_text(idb("bundle", "show", "--format", "spiffe").out)
    verified = idb("revoke", "verify", str(proof), "--bundle", str(bundle), "-o", "json")
    assert verified.code == 0, verified.err
    assert verified.json["verified"] is True
    assert revocation_id in json.dumps(verified.json["statement"])
    assert name in json.dumps(verified.json["statement"])

    listed = idb("revoke", "list", "-o", "json").json["revocations"]
    assert revocation_id in [one["id"] for one in listed]
    assert revocation_id in idb("revoke", "list").out


def test_a_forged_statement_does_not_hold(idb: Idb, issued: Issued, tmp_path: Path) -> None:
    done = idb("revoke", "--serial", issued.serial, "--yes", "-o", "json")
    revocation_id = done.json["revocation"]["id"]
    proof, bundle = tmp_path / "proof.json", tmp_path / "bundle.json"
    status = ["revoke", "status", revocation_id, "--wait", "20s", "--statement", str(proof)]
    assert idb(*status).code == 0
    bundle.write_text(idb("bundle", "show", "--format", "jwks").out)
    verify = ["revoke", "verify", str(proof), "--bundle", str(bundle)]
    assert idb(*verify).code == 0
    assert idb(*verify, "--trust-domain", "other.example").code == 3
    document = json.loads(proof.read_text())
    document["payload"] = document["payload"][:-4] + "AAAA"
    proof.write_text(json.dumps(document))
    forged = idb(*verify, "--trust-domain", "dev.example.org")
    assert forged.code == 3, forged.err
    assert forged.out == ""
    proof.write_text("[]")
    assert idb(*verify).code == 2


def test_one_document_for_programs(idb: Idb, issued: Issued) -> None:
    done = idb("revoke", "--serial", issued.serial, "--yes", "-o", "json")
    assert (done.code, done.err) == (0, "")
    assert set(done.json) == {"plan", "revocation", "propagation", "revoked_ids", "repeated"}
    assert done.json["repeated"] is False
    assert done.json["plan"]["live_x509"] == 1
    assert done.json["plan"]["holds"] is False
    assert done.json["revoked_ids"] == [issued.serial]
    assert done.json["revocation"]["hold"] == ""
    assert done.json["propagation"]["silent"] == 0
    planned = idb("revoke", "--serial", issued.serial, "--plan", "-o", "json")
    assert set(planned.json) == {"plan"}
    assert planned.json["plan"]["already_revoked"] == 1
    # Revoked already: recorded, and no error.
    repeat = idb("revoke", "--serial", issued.serial, "--yes", "-o", "json")
    assert repeat.code == 0
    assert repeat.json["revoked_ids"] == []
    assert repeat.json["revocation"]["already_revoked"] == 1


def test_without_waiting_nobody_is_asked_for(
    idb: Idb, dev_broker: DevBroker, issued: Issued
) -> None:
    with verifier(dev_broker, dev_broker.unique("mute"), acknowledges=False):
        done = idb("revoke", "--serial", issued.serial, "--yes", "--no-wait", "-o", "json")
    assert done.code == 0
    assert done.json["propagation"] is None


def test_a_silent_verifier_is_named_and_blocks_nothing(
    idb: Idb, dev_broker: DevBroker, issued: Issued
) -> None:
    name = dev_broker.unique("mute")
    with verifier(dev_broker, name, acknowledges=False):
        done = idb("revoke", "--serial", issued.serial, "--yes")
        assert done.code == 0, done.err
        silent = next(line for line in done.err.splitlines() if line.startswith("silent: "))
        assert name in silent
        assert state_of(idb, issued.serial) == "revoked"
        late = idb("revoke", "status", done.out.split()[1], "--wait", "1s", "-o", "json")
        assert late.code == 6
        assert late.error["reason"] == "NOT_ACKNOWLEDGED_IN_TIME"
        assert name in late.error["message"]
        assert late.json["propagation"]["silent"] == 1


def test_every_kind_of_subject_has_a_plan(idb: Idb, issued: Issued) -> None:
    spki = issued.certificate.public_key().public_bytes(
        Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    )
    row = idb("credential", "show", issued.serial, "-o", "json").json
    subjects = {
        "--spiffe-id": issued.spiffe_id,
        "--serial": issued.serial.upper(),
        "--node": issued.node,
        "--entry": issued.entry_id,
        "--key-fingerprint": hashlib.sha256(spki).hexdigest(),
        "--authority": row["authority_id"],
        "--select": f"owner={issued.entry_id} kind=x509 issued-after=1h",
    }
    for option, value in subjects.items():
        planned = idb("revoke", option, value, "--plan", "-o", "json")
        assert planned.code == 0, planned.err
        plan = planned.json["plan"]
        assert plan["subject"]["kind"] == option[2:]
        assert plan["live_x509"] >= 1, option
        assert issued.spiffe_id in str(plan["identities"]) or option == "--authority"
        # A selection that entries cannot be judged by holds nothing.
        assert plan["holds"] is (option in ("--spiffe-id", "--node", "--entry"))
        assert bool(plan["blocked_keys"]) is (option == "--key-fingerprint")
    assert state_of(idb, issued.serial) == "issued"


def test_a_selection_is_revoked_and_held(idb: Idb, issued: Issued) -> None:
    done = idb(
        *("revoke", "--select", f"owner={issued.entry_id}", "--hold", f"h-{issued.node}"),
        *("--yes", "-o", "json"),
    )
    assert done.code == 0, done.err
    assert done.json["revoked_ids"] == [issued.serial]
    assert done.json["revocation"]["held_entry_ids"] == [issued.entry_id]
    shown = idb("entry", "show", issued.entry_id, "-o", "json").json
    assert shown["held_by"] == f"h-{issued.node}"
    assert f"held by h-{issued.node}" in idb("entry", "list", "--spiffe-id", issued.path).out


def test_a_node_is_put_on_hold(idb: Idb, issued: Issued) -> None:
    done = idb("revoke", "--node", issued.node, "--comment", "lost", "--yes", "-o", "json")
    assert done.code == 0, done.err
    assert done.json["revocation"]["state"] in ("committed", "closed")
    assert done.json["revocation"]["revoked"] == 2  # the node's own, and the workload's
    shown = idb("node", "show", issued.node)
    assert f"on hold: {done.json['revocation']['id']}" in shown.out
    assert "unspecified: lost" in shown.out
    assert idb("node", "show", issued.node, "-o", "json").json["banned"] is True
    assert idb("hold", "lift", done.json["revocation"]["id"], "--yes").code == 0
    assert idb("node", "show", issued.node, "-o", "json").json["banned"] is False
    assert state_of(idb, issued.serial) == "revoked"


def test_a_large_revocation_is_followed_to_its_end(
    dev_broker: DevBroker, idb: Idb, issued: Issued, tmp_path: Path
) -> None:
    """The broker is done at once; what it says is that it still runs, for a while."""
    running = 6

    def slowly(method: str, answer: bytes) -> bytes:
        nonlocal running
        kinds: dict[str, Any] = {
            REVOKE: revocation_pb.RevokeResponse,
            GET: revocation_pb.GetRevocationResponse,
        }
        if method not in kinds or not running:
            return answer
        running -= 1
        changed = kinds[method].FromString(answer)
        changed.revocation.state = revocation_pb.REVOCATION_STATE_RUNNING
        return bytes(changed.SerializeToString())

    relay, admin = tmp_path / "relay.sock", Path(dev_broker.state.broker.admin_socket)
    with relaying(relay, admin, slowly):
        done = idb("--socket", str(relay), "revoke", "--serial", issued.serial, "--yes")
    assert (done.code, running) == (0, 0), done.err
    said = [line for line in done.err.splitlines() if "revoked" in line or "durable" in line]
    assert re.fullmatch(r"ordered, durable after [\d,]+ ms: rev-[0-9a-f]{16}; .*", said[1])
    assert said[2:4] == ["1 of about 1 revoked", "revoked: 1 credential"]
    assert "running" not in done.out


def test_who_has_heard_may_be_unknown(
    dev_broker: DevBroker, idb: Idb, issued: Issued, tmp_path: Path
) -> None:
    """It is revoked: that the broker went away after that is told, and is no failure."""

    def lose(method: str, answer: bytes) -> bytes:
        if method == GET:
            raise Lost
        return answer

    relay, admin = tmp_path / "relay.sock", Path(dev_broker.state.broker.admin_socket)
    with relaying(relay, admin, lose):
        revoke = ["revoke", "--serial", issued.serial, "--yes", "-o", "json"]
        done = idb("--socket", str(relay), *revoke)
    assert done.code == 0
    assert done.json["propagation"] is None
    assert done.json["revoked_ids"] == [issued.serial]
    assert "it is revoked; who has heard is not known" in done.err
    assert f"idb revoke status {done.json['revocation']['id']}" in done.err


# --- holds ------------------------------------------------------------------------------------


def test_a_certificate_on_hold_is_valid_again_once_it_is_lifted(idb: Idb, issued: Issued) -> None:
    name = f"hold-{issued.node}"
    done = idb(
        *("revoke", "--spiffe-id", issued.path, "--reason", "certificate-hold", "--hold", name),
        *("--hold-until", "8h", "--yes"),
    )
    assert done.code == 0, done.err
    assert f"idb hold lift {name}" in done.err
    assert state_of(idb, issued.serial) == "revoked"
    listed = idb("hold", "list")
    line = next(line for line in listed.out.splitlines() if line.startswith(name))
    assert "certificate-hold" in line
    assert "in 8h" in line or "in 7h 59m" in line
    (held,) = (o for o in idb("hold", "list", "-o", "json").json["holds"] if o["name"] == name)
    assert held["held_entry_ids"] == [issued.entry_id]

    refused = idb("hold", "lift", name)
    assert refused.code == 2
    assert "--yes" in refused.err
    assert "valid again: 1 credential" in refused.err
    assert state_of(idb, issued.serial) == "revoked"

    lifted = idb("hold", "lift", name, "--yes")
    assert (lifted.code, lifted.out) == (0, f"{issued.entry_id}\n")
    assert "1 credential is valid again" in lifted.err
    assert state_of(idb, issued.serial) == "issued"
    assert again(idb, issued).code == 0
    assert name not in idb("hold", "list").out
    over = next(o for o in idb("hold", "list", "--all").out.splitlines() if o.startswith(name))
    assert "lifted by" in over
    twice = idb("hold", "lift", name, "--yes", "-o", "json")
    assert (twice.code, twice.json["released"]) == (0, 0)


def test_without_a_hold_the_next_one_is_issued_at_once(idb: Idb, issued: Issued) -> None:
    done = idb("revoke", "--spiffe-id", issued.path, "--no-hold", "--yes")
    assert done.code == 0, done.err
    assert "nothing is held" in done.err
    assert state_of(idb, issued.serial) == "revoked"
    assert again(idb, issued).code == 0


@pytest.mark.parametrize(
    "until", ["2001-01-01T00:00:00Z", "0s", "soon", "9999-12-31T23:59:59-23:59"]
)
def test_a_hold_that_cannot_end_then(idb: Idb, until: str) -> None:
    refused = idb("revoke", "--spiffe-id", "/tests/x", "--hold-until", until, "--plan")
    assert refused.code == 2
    assert "reason: USAGE" in refused.err


# --- keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize("found_in", ["key.pem", "svid.pem"])
def test_a_leaked_key_is_refused_for_ever(
    idb: Idb, issued: Issued, found_in: str, tmp_path: Path
) -> None:
    file = issued.directory / found_in
    planned = idb("compromised", "--key", str(file), "--plan", "-o", "json").json["plan"]
    spki = issued.certificate.public_key().public_bytes(
        Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    )
    assert planned["blocked_keys"] == [hashlib.sha256(spki).hexdigest()]
    done = idb("compromised", "--key", str(file), "--comment", "found in a repository", "--yes")
    assert done.code == 0, done.err
    assert "PRIVATE" not in done.out + done.err
    row = idb("credential", "show", issued.serial, "-o", "json").json
    assert (row["state"], row["reason"]) == ("revoked", "key-compromise")


def test_a_key_nobody_has_seen_is_refused_beforehand(idb: Idb) -> None:
    fingerprint = hashlib.sha256(b"nobody").hexdigest()
    done = idb("compromised", "--fingerprint", fingerprint, "--yes", "-o", "json")
    assert done.code == 0, done.err
    assert done.json["revocation"]["revoked"] == 0
    assert done.json["plan"]["blocked_keys"] == [fingerprint]


# --- asking -----------------------------------------------------------------------------------


def test_without_a_terminal_it_wants_a_yes(idb: Idb, issued: Issued) -> None:
    refused = idb("revoke", "--serial", issued.serial)
    assert refused.code == 2
    assert "reason: USAGE" in refused.err
    assert "--yes" in refused.err
    assert "live credentials" in refused.err
    assert state_of(idb, issued.serial) == "issued"


def typed(dev_broker: DevBroker, answer: str, *arguments: str) -> tuple[int, str]:
    """`idb …` at a terminal where `answer` is typed; its exit code and all it says."""
    master, slave = pty.openpty()
    try:
        os.write(master, answer.encode())
        done = subprocess.run(
            [
                *(sys.executable, "-m", "identity_broker.cli.main"),
                *("--dir", str(dev_broker.directory), *arguments),
            ],
            stdin=slave,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(master)
        os.close(slave)
    return done.returncode, done.stdout + done.stderr


def test_on_a_terminal_it_asks(dev_broker: DevBroker, idb: Idb, issued: Issued) -> None:
    revoke = ["revoke", "--serial", issued.serial]
    for answer, code in (("n\n", 130), ("\n", 130), ("\x04", 130)):
        ended, said = typed(dev_broker, answer, *revoke)
        assert ended == code, said
        assert "live credentials" in said
        assert state_of(idb, issued.serial) == "issued"
    ended, said = typed(dev_broker, "y\n", *revoke)
    assert ended == 0, said
    assert state_of(idb, issued.serial) == "revoked"


# --- connections that break -------------------------------------------------------------------


def test_a_lost_answer_is_not_a_second_revocation(
    dev_broker: DevBroker, idb: Idb, issued: Issued, tmp_path: Path
) -> None:
    relay, admin = tmp_path / "relay.sock", Path(dev_broker.state.broker.admin_socket)
    revoke = ["--socket", str(relay), "revoke", "--serial", issued.serial, "--yes", "-o", "json"]
    with losing_answers(relay, admin, times=1) as lost:
        done = idb(*revoke)
        assert (done.code, lost()) == (0, 1), done.err
    found = idb("revoke", "list", "-o", "json").json["revocations"]
    assert len([one for one in found if one["subject"]["value"] == issued.serial]) == 1


def test_when_no_answer_comes_it_says_how_to_find_out(
    dev_broker: DevBroker, idb: Idb, issued: Issued, tmp_path: Path
) -> None:
    relay, admin = tmp_path / "relay.sock", Path(dev_broker.state.broker.admin_socket)
    revoke = ["revoke", "--serial", issued.serial, "--yes", "-o", "json"]
    with losing_answers(relay, admin, times=9):
        lost = idb("--socket", str(relay), *revoke)
    assert lost.code == 6
    revocation_id = re.search(r"--id (rev-[0-9a-f]{16})", lost.error["hint"])
    assert revocation_id
    repeat = idb(*revoke, "--id", revocation_id[1])
    assert repeat.code == 0, repeat.err
    assert repeat.json["revocation"]["revoked"] == 1
    assert repeat.json["revoked_ids"] == []
    assert repeat.json["repeated"] is True
    other = idb("revoke", "--node", issued.node, "--yes", "--id", revocation_id[1])
    assert other.code == 5
    assert "reason: REVOCATION_EXISTS" in other.err
    assert f"idb revoke status {revocation_id[1]}" in other.err


# --- the same again ---------------------------------------------------------------------------


def test_a_repeat_says_that_it_is_one(idb: Idb, issued: Issued) -> None:
    name = f"again-{issued.node}"
    revoke = ["revoke", "--spiffe-id", issued.path, "--no-hold", "--id", name, "--yes"]
    first = idb(*revoke, "--comment", "first")
    assert first.code == 0, first.err
    assert "revoked: 1 credential" in first.err
    assert again(idb, issued).code == 0
    second = idb(*revoke)
    assert second.code == 0, second.err
    assert "ordered before, " in second.err
    assert f"{name}; nothing new was revoked by this command" in second.err
    assert "revoked: 1 credential" not in second.err
    assert "1 credential of the subject may still be valid" in second.err
    assert 'its comment stays "first"' in second.err


def test_a_repeat_of_what_was_lifted_is_refused(idb: Idb, issued: Issued) -> None:
    name = f"lifted-{issued.node}"
    revoke = ["revoke", "--spiffe-id", issued.path, "--id", name, "--yes"]
    assert idb(*revoke).code == 0
    stronger = idb(*revoke, "--reason", "key-compromise")
    assert stronger.code == 5
    assert f'the revocation "{name}" is for unspecified' in stronger.err
    assert idb("hold", "lift", name, "--yes").code == 0
    repeat = idb(*revoke)
    assert repeat.code == 5
    assert "was lifted: this is another incident" in repeat.err


@pytest.mark.parametrize("option", ["--id", "--hold"])
def test_a_bad_name_is_refused_before_the_plan(idb: Idb, issued: Issued, option: str) -> None:
    refused = idb("revoke", "--spiffe-id", issued.path, option, "two words", "--yes")
    assert refused.code == 2
    assert "reason: SUBJECT_INVALID" in refused.err
    assert "live credentials" not in refused.err
    assert state_of(idb, issued.serial) == "issued"


# --- what holds and strands -------------------------------------------------------------------


def test_a_hold_on_one_certificate_is_told_as_what_it_is(idb: Idb, issued: Issued) -> None:
    done = idb("revoke", "--serial", issued.serial, "--reason", "certificate-hold", "--yes")
    assert done.code == 0, done.err
    assert "issued as before: its hold only makes valid again" in done.err
    assert "nothing is held" not in done.err
    assert "0 entries" not in done.err
    assert re.search(r"(?m)^idb hold lift rev-\S+ makes valid again what was revoked$", done.err)


def test_a_node_that_cannot_attest_again_is_told_of(idb: Idb, issued: Issued) -> None:
    node = f"spiffe://dev.example.org/idb/node/join_token/{issued.node}"
    serial = idb("node", "show", issued.node, "-o", "json").json["serial"]
    authority = idb("credential", "show", serial, "-o", "json").json["authority_id"]
    planned = idb("revoke", "--authority", authority, "--plan")
    assert "another authority signs them" in planned.out
    assert "nodes that need a new token" in planned.out
    done = idb("revoke", "--serial", serial, "--yes", "-o", "json")
    assert done.json["plan"]["stranded_node_ids"] == [node]
    assert "SVID revoked" in idb("node", "show", issued.node).out
    doctor = idb("doctor", "-o", "json").json["findings"]
    (found,) = (one for one in doctor if "own SVID is revoked" in one["detail"])
    assert (found["check"], found["verdict"]) == ("nodes", "warn")
    assert found["fix"].startswith("idb token generate --node ")
    # It has nothing left to lose.
    planned = idb("revoke", "--authority", authority, "--plan", "-o", "json").json["plan"]
    assert node not in planned["stranded_node_ids"]


def test_the_command_for_a_stranded_node_follows_the_revocation(
    idb: Idb, issued: Issued, tmp_path: Path
) -> None:
    serial = idb("node", "show", issued.node, "-o", "json").json["serial"]
    done = idb("revoke", "--serial", serial, "--yes")
    assert done.code == 0, done.err
    hint = f"hint: idb token generate --node {issued.node}"
    assert done.err.index("revoked: 1 credential") < done.err.index(hint)
    assert again(idb, issued).code != 0
    token = tmp_path / "next-token"
    assert idb("token", "generate", "--node", issued.node, "--write", str(token)).code == 0
    fetch = ["svid", "fetch", "--state-dir", str(issued.state), "--spiffe-id", issued.path]
    # The token it joined with is spent: what the broker refuses is told, not that.
    spent = idb(*fetch, "--token-file", str(tmp_path / "token"), "--timeout", "3")
    assert "reason: CREDENTIAL_REVOKED" in spent.err
    rejoined = idb(*fetch, "--token-file", str(token), "--timeout", "10")
    assert rejoined.code == 0, rejoined.err
    assert "attested" in idb("node", "show", issued.node).out
