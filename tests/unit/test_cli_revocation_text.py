"""What is said of a revocation before, during and after it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from identity_broker.cli import revocation_text as text
from identity_broker.cli.revoking import Order
from identity_client.admin import (
    IdentityCount,
    NodeConcerned,
    Propagation,
    Revocation,
    RevocationPlan,
    RevocationReason,
    RevocationState,
    Subject,
    SubjectKind,
    Verifier,
    VerifierState,
)

NOW = datetime(2030, 1, 1, tzinfo=UTC)
SUBJECT = Subject(SubjectKind.SPIFFE_ID, "spiffe://example.org/shop/orders")
PLAN = RevocationPlan(
    subject=SUBJECT,
    live_x509=2,
    live_jwt=1,
    already_revoked=4,
    expired=12_000,
    identities=(IdentityCount(spiffe_id=SUBJECT.value, live=3),),
    identity_count=1,
    held_entry_ids=("e-1",),
    held_entry_count=1,
    nodes=(NodeConcerned(spiffe_id="spiffe://example.org/idb/node/a/b", connected=True),),
    node_count=1,
    connected_verifiers=5,
    callers_known=False,
    callers=(),
    holds=True,
    blocked_keys=(),
    stranded_node_ids=(),
    stranded_node_count=0,
)
REVOCATION = Revocation(
    id="rev-1",
    subject=SUBJECT,
    reason=RevocationReason.KEY_COMPROMISE,
    comment="",
    actor="root",
    state=RevocationState.COMMITTED,
    ordered_at=NOW,
    committed_at=NOW,
    revoked=3,
    already_revoked=4,
    expired=12_000,
    released=0,
    hold="rev-1",
    held_entry_ids=("e-1",),
    sequence=9,
)
VERIFIER = Verifier(
    name="spiffe://example.org/shop/web",
    kind="workload",
    state=VerifierState.ACKNOWLEDGED,
    acknowledged_at=NOW,
    latency_ms=4,
    node_id="",
)
HEARD = Propagation(
    verifiers=(VERIFIER,),
    told=5,
    acknowledged=4,
    silent=1,
    gone=0,
    away=0,
    p50_ms=4,
    p99_ms=1234,
    within_objective_permille=999,
)


def lines(said: str) -> dict[str, str]:
    """The label of a fact to its first line."""
    found = {}
    for line in said.splitlines():
        label, _, value = line.partition("  ")
        if label.strip():
            found[label.strip()] = value.strip()
    return found


def test_a_plan_says_all_that_will_be_hit() -> None:
    said = lines(text.plan_facts(PLAN, hold=True))
    assert said["subject"] == "spiffe-id=spiffe://example.org/shop/orders"
    assert said["live credentials"] == "3 (2 X.509-SVIDs, 1 JWT-SVID)"
    assert said["revoked before"] == "4"
    assert said["expired"] == "12,000"
    assert said["future credentials"] == "none from 1 entry while held:"
    assert said["nodes"] == "spiffe://example.org/idb/node/a/b (connected)"
    assert said["connected verifiers"] == "5"
    assert said["tokens derived"] == "1 JWT-SVID"
    assert said["called in the last day by"] == "not known to the broker"
    assert "keys refused for ever" not in said


def test_a_plan_without_a_hold_says_that_issuance_goes_on() -> None:
    said = lines(text.plan_facts(PLAN, hold=False))
    assert said["future credentials"].startswith("issued as before")


def test_a_hold_that_stops_nothing_is_not_said_to_stop_issuance() -> None:
    said = lines(text.plan_facts(replace(PLAN, holds=False), hold=True))
    assert said["future credentials"].startswith("issued as before: its hold only makes valid")


def test_another_authority_signs_what_is_issued_next() -> None:
    plan = replace(PLAN, subject=Subject(SubjectKind.AUTHORITY, "a1"), holds=False)
    assert lines(text.plan_facts(plan, hold=False))["future credentials"] == (
        "another authority signs them"
    )


def test_nodes_that_cannot_come_back_are_named_with_what_helps() -> None:
    ids = tuple(f"spiffe://example.org/idb/node/join_token/n{number}" for number in range(100))
    plan = replace(PLAN, stranded_node_ids=ids, stranded_node_count=120)
    said = text.plan_facts(plan, hold=True)
    assert lines(said)["nodes that need a new token"] == ids[0]
    assert "and 115 more" in said
    told = text.joining_again(plan)
    assert told[0] == "120 nodes cannot attest again without a new token"
    assert told[1] == "hint: idb token generate --node n0"
    assert told[-1] == "and 115 more: idb node list"
    assert text.joining_again(PLAN) == []


def test_a_plan_names_a_few_and_counts_the_rest() -> None:
    many = replace(
        PLAN,
        held_entry_ids=tuple(f"e-{number}" for number in range(100)),
        held_entry_count=2_345,
        callers_known=True,
        callers=("spiffe://example.org/web",),
        blocked_keys=("ab" * 32,),
    )
    said = text.plan_facts(many, hold=True)
    assert "e-4" in said
    assert "e-5" not in said
    assert "and 2,340 more" in said
    assert lines(said)["keys refused for ever"] == "ab" * 32
    assert lines(said)["called in the last day by"] == "spiffe://example.org/web"


@pytest.mark.parametrize(
    ("order", "plan", "stops"),
    [
        (Order(reason="unspecified"), PLAN, True),
        (Order(reason="unspecified", without_hold=True), PLAN, False),
        (Order(reason="unspecified"), replace(PLAN, holds=False), False),
        # It is what can be lifted.
        (Order(reason="certificate-hold"), replace(PLAN, holds=False), True),
    ],
)
def test_whether_the_plan_speaks_of_a_hold(
    order: Order, plan: RevocationPlan, *, stops: bool
) -> None:
    assert order.has_hold(plan) is stops


def test_who_has_heard_in_one_line() -> None:
    assert text.summary(HEARD) == "4 of 5 verifiers acknowledged, p50 4 ms, p99 1,234 ms"
    nobody = replace(HEARD, told=0, acknowledged=0, silent=0, p50_ms=None, p99_ms=None)
    assert text.summary(nobody).startswith("no verifier is connected")
    assert dict(text.propagation_facts(HEARD))["within one second"] == "99.9 % of those connected"


def test_who_is_away_is_counted_named_and_speaks_for_nothing() -> None:
    node = "spiffe://example.org/idb/node/a/b"
    gone_home = replace(
        VERIFIER,
        name=node,
        kind="agent",
        state=VerifierState.AWAY,
        acknowledged_at=None,
        latency_ms=None,
    )
    heard = replace(HEARD, verifiers=(gone_home, VERIFIER), away=1)
    assert text.summary(heard).endswith("p99 1,234 ms, 1 away")
    assert getattr(dict(text.propagation_facts(heard))["away"], "text", "") == "1 node"
    assert text.away(heard) == [node]
    assert text.silent(heard) == []
    assert "away" in text.verifier_table(heard.verifiers, NOW)
    alone = replace(
        heard, told=0, acknowledged=0, silent=0, p50_ms=None, within_objective_permille=None
    )
    assert text.summary(alone).startswith("no verifier is connected, 1 away;")
    assert "within one second" not in dict(text.propagation_facts(alone))


def test_what_a_verifier_calls_itself_cannot_steer_the_terminal() -> None:
    silent = replace(VERIFIER, name="\x1b[2Jevil", state=VerifierState.SILENT, latency_ms=None)
    said = text.verifier_table([silent], NOW)
    assert "\x1b" not in said
    assert text.silent(replace(HEARD, verifiers=(silent, VERIFIER))) == [silent.name]


def test_many_verifiers_are_counted() -> None:
    said = text.verifier_table([VERIFIER] * 60, NOW)
    assert "and 10 more; -o json lists them" in said
    assert said.count(VERIFIER.name) == 50


def test_a_revocation_says_what_became_of_it() -> None:
    said = lines(text.revocation_facts(REVOCATION, NOW))
    assert (said["revocation"], said["state"], said["revoked"]) == ("rev-1", "committed", "3")
    assert said["entries held"] == "e-1"
    assert "valid again" not in said
    lifted = replace(REVOCATION, released=2, comment="a drill")
    said = lines(text.revocation_facts(lifted, NOW))
    assert (said["valid again"], said["comment"]) == ("2", "a drill")


def test_a_statement_of_any_shape_is_shown() -> None:
    said = text.statement_facts({"order_id": "rev-1", "verifiers": [{"name": "a"}], "none": None})
    assert lines(said) == {"order id": "rev-1", "verifiers": "name: a", "none": "-"}
