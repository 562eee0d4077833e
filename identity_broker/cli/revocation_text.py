"""Revocations as people read them: the plan, what became of it, who has heard."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TextIO

from identity_broker.cli.output import Row, Style, Text, facts, moment, table

if TYPE_CHECKING:
    from identity_client.admin import Propagation, Revocation, RevocationPlan, Verifier

_NAMED = 5  # of a list in a plan
_VERIFIERS = 50  # in a table; JSON has them all
_STATES = {"running": Style.WARN, "committed": Style.GOOD, "closed": Style.GOOD}
_HEARD = {"acknowledged": Style.GOOD, "silent": Style.BAD, "away": Style.BAD, "gone": Style.DIM}


def count(number: int, noun: str, nouns: str = "") -> str:
    """A number and its noun: "1 entry", "2,000 entries"."""
    return f"{number:,} {noun if number == 1 else nouns or f'{noun}s'}"


def plan_facts(plan: RevocationPlan, *, hold: bool, stream: TextIO | None = None) -> str:
    """What revoking would hit, for `stream` (stdout); `hold`: whether issuance is stopped."""
    live = plan.live_x509 + plan.live_jwt
    return facts(
        [
            ("subject", str(plan.subject)),
            (
                "live credentials",
                Text(
                    f"{live:,} ({count(plan.live_x509, 'X.509-SVID')}, "
                    f"{count(plan.live_jwt, 'JWT-SVID')})",
                    Style.BAD if live else Style.DIM,
                ),
            ),
            ("revoked before", f"{plan.already_revoked:,}"),
            ("expired", f"{plan.expired:,}"),
            (
                "identities",
                _some(
                    (f"{one.spiffe_id} ({one.live:,} live)" for one in plan.identities),
                    plan.identity_count,
                ),
            ),
            ("future credentials", _future(plan, hold=hold)),
            (
                "nodes",
                _some(
                    (
                        f"{one.spiffe_id} ({'connected' if one.connected else 'not connected'})"
                        for one in plan.nodes
                    ),
                    plan.node_count,
                ),
            ),
            *_stranded(plan),
            ("connected verifiers", f"{plan.connected_verifiers:,}"),
            ("tokens derived", count(plan.live_jwt, "JWT-SVID")),
            ("called in the last day by", _callers(plan)),
            *([("keys refused for ever", "\n".join(plan.blocked_keys))] * bool(plan.blocked_keys)),
        ],
        stream,
    )


def _stranded(plan: RevocationPlan) -> list[tuple[str, Text]]:
    if not plan.stranded_node_count:
        return []
    names = _some(plan.stranded_node_ids, plan.stranded_node_count)
    return [("nodes that need a new token", Text(names, Style.WARN))]


def joining_again(plan: RevocationPlan) -> list[str]:
    """What to do about the nodes that are left without an SVID."""
    if not plan.stranded_node_count:
        return []
    number = count(plan.stranded_node_count, "node")
    told = [f"{number} cannot attest again without a new token"]
    told += [f"hint: {token_command(one)}" for one in plan.stranded_node_ids[:_NAMED]]
    if plan.stranded_node_count > _NAMED:
        told.append(f"and {plan.stranded_node_count - _NAMED:,} more: idb node list")
    return told


def token_command(node_id: str) -> str:
    """The command that makes a token for the node."""
    return f"idb token generate --node {node_id.rpartition('/')[2]}"


def _future(plan: RevocationPlan, *, hold: bool) -> str | Text:
    if plan.subject.kind.value == "authority":
        return "another authority signs them"
    if not hold:
        return Text("issued as before: nothing is held", Style.WARN)
    if not plan.holds:
        return Text(
            "issued as before: its hold only makes valid again, once lifted, what is revoked",
            Style.WARN,
        )
    if not plan.held_entry_count:
        return "none are issued while the hold lasts; no entry is concerned"
    held = _some(plan.held_entry_ids, plan.held_entry_count)
    return f"none from {count(plan.held_entry_count, 'entry', 'entries')} while held:\n{held}"


def _callers(plan: RevocationPlan) -> str:
    if not plan.callers_known:
        return "not known to the broker"
    return _some(plan.callers, len(plan.callers))


def _some(names: Iterable[str], number: int) -> str:
    listed = list(names)
    shown = listed[:_NAMED]
    if number > len(shown):
        shown.append(f"and {number - len(shown):,} more")
    return "\n".join(shown) or "none"


def revocation_facts(
    revocation: Revocation, now: datetime, more: Sequence[tuple[str, str | Text]] = ()
) -> str:
    """What became of it."""
    state = revocation.state.value
    held = _some(revocation.held_entry_ids, len(revocation.held_entry_ids))
    pairs: list[tuple[str, str | Text]] = [
        ("revocation", revocation.id),
        ("subject", str(revocation.subject)),
        ("state", Text(state, _STATES.get(state, Style.WARN))),
        ("reason", revocation.reason.value),
    ]
    if revocation.comment:
        pairs.append(("comment", revocation.comment))
    pairs += [
        ("ordered", moment(revocation.ordered_at, now=now)),
        ("by", revocation.actor),
        ("revoked", f"{revocation.revoked:,}"),
        ("revoked before", f"{revocation.already_revoked:,}"),
        ("expired", f"{revocation.expired:,}"),
    ]
    if revocation.released:
        pairs.append(("valid again", f"{revocation.released:,}"))
    if revocation.hold:
        pairs += [("hold", revocation.hold), ("entries held", held)]
    return facts([*pairs, *more])


def propagation_facts(propagation: Propagation) -> list[tuple[str, str | Text]]:
    """Who has heard of it, in numbers."""
    pairs: list[tuple[str, str | Text]] = [("verifiers", summary(propagation))]
    if propagation.away:
        pairs.append(("away", Text(count(propagation.away, "node"), Style.BAD)))
    if propagation.gone:
        pairs.append(("gone since", count(propagation.gone, "verifier")))
    permille = propagation.within_objective_permille
    if permille is not None:
        pairs.append(("within one second", f"{permille / 10:g} % of those connected"))
    return pairs


def summary(propagation: Propagation) -> str:
    """Who has heard of it, in one line."""
    missing = f", {propagation.away:,} away" if propagation.away else ""
    if not propagation.told:
        return f"no verifier is connected{missing}; one that connects is told before anything else"
    text = f"{propagation.acknowledged:,} of {count(propagation.told, 'verifier')} acknowledged"
    if propagation.p50_ms is not None and propagation.p99_ms is not None:
        text += f", p50 {propagation.p50_ms:,} ms, p99 {propagation.p99_ms:,} ms"
    return text + missing


def verifier_table(verifiers: Sequence[Verifier], now: datetime) -> str:
    """Every verifier, the silent ones first, then those that are away."""
    rows: list[Row] = [
        [
            one.name,
            one.kind,
            Text(one.state.value, _HEARD.get(one.state.value, Style.WARN)),
            f"{one.latency_ms:,} ms" if one.latency_ms is not None else "-",
            moment(one.acknowledged_at, now=now),
        ]
        for one in verifiers[:_VERIFIERS]
    ]
    if not rows:
        return ""
    if len(verifiers) > _VERIFIERS:
        rows.append([f"and {len(verifiers) - _VERIFIERS:,} more; -o json lists them", *[""] * 4])
    return table(["verifier", "kind", "state", "after", "acknowledged"], rows, empty="")


def silent(propagation: Propagation, most: int = _NAMED) -> list[str]:
    """The names of those that are connected and have not acknowledged; at most `most`."""
    return _in_state(propagation, "silent", most)


def away(propagation: Propagation, most: int = _NAMED) -> list[str]:
    """The names of nodes that were not connected and have not acknowledged; at most `most`."""
    return _in_state(propagation, "away", most)


def _in_state(propagation: Propagation, state: str, most: int) -> list[str]:
    return [one.name for one in propagation.verifiers if one.state.value == state][:most]


def revocation_table(found: Sequence[Revocation], now: datetime) -> str:
    """Revocations, one a line."""
    rows: list[Row] = [
        [
            one.id,
            str(one.subject),
            one.reason.value,
            Text(one.state.value, _STATES.get(one.state.value, Style.WARN)),
            f"{one.revoked:,}",
            one.hold or "-",
            moment(one.ordered_at, now=now),
        ]
        for one in found
    ]
    columns = ["revocation", "subject", "reason", "state", "revoked", "hold", "ordered"]
    return table(columns, rows, empty="nothing was revoked yet")


def statement_facts(payload: Any) -> str:
    """What a verified statement says, nested values below each other."""
    return facts([(key.replace("_", " "), _plain(value)) for key, value in payload.items()])


def _plain(value: Any) -> str:
    """A value on one line or several; what is nested is indented."""
    if isinstance(value, dict) and value:
        return "\n".join(
            f"{key}:\n{textwrap.indent(_plain(held), '  ')}"
            if isinstance(held, (dict, list)) and held
            else f"{key}: {_plain(held)}"
            for key, held in value.items()
        )
    if isinstance(value, list) and value:
        more = [f"and {len(value) - _VERIFIERS:,} more"] * (len(value) > _VERIFIERS)
        return "\n".join([*map(_plain, value[:_VERIFIERS]), *more])
    return "-" if value in (None, "", {}, []) else str(value)
