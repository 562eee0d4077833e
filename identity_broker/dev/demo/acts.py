"""The three acts: before, with identities, incident.

- A step is claimed only after it was seen in another process's own words.
- Act 3 gives `orders` a certificate that would stay valid for minutes: what ends it is the
  revocation, and the reason the server gives (PEER_REVOKED) says so.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from datetime import datetime
from typing import Any

from identity_broker.dev.demo.actor import Actor, Event
from identity_broker.dev.demo.stage import TRUST_DOMAIN, Stage

ORDERS = f"spiffe://{TRUST_DOMAIN}/orders"
INVENTORY = f"spiffe://{TRUST_DOMAIN}/inventory"
_ROTATIONS_WANTED = 2
_ROTATION_SECONDS = 40.0
_ORDERS_PER_SECOND = 50
_SHORT = "10s"
_LONG = "10m"


def play(stage: Stage) -> dict[str, Any]:
    """Play all acts; return what was measured."""
    api_key = f"sk_live_{secrets.token_hex(12)}"
    before(stage, api_key)
    cast = with_identities(stage, api_key)
    measured = {**cast.measured, **incident(stage, cast)}
    _curtain(stage)
    return measured


class Cast:
    """Who is on stage after act 2, and what was measured so far."""

    def __init__(self, orders: Actor, customers: Actor, intruder: Actor, entry_id: str) -> None:
        self.orders = orders
        self.customers = customers
        self.intruder = intruder
        self.entry_id = entry_id
        self.measured: dict[str, Any] = {}


# --- act 1 ------------------------------------------------------------------------------------


def before(stage: Stage, api_key: str) -> None:
    """One API key, known to two services and to whoever finds it."""
    tell = stage.timeline
    tell.act("Act 1  Before: one API key that both services share")
    inventory = stage.actor("inventory", {"api_key": api_key})
    address = inventory.wait_for("ready")["address"]
    tell.say("inventory", f"listens on {address}, accepts the API key {_masked(api_key)}")
    orders = stage.actor("orders", {"inventory": address, "api_key": api_key})
    intruder = stage.actor("intruder", {"inventory": address})
    shop = orders.wait_for("ready")["address"]
    customers = stage.actor("customers", {"orders": shop, "per_second": 20})
    call = inventory.wait_for("call")
    tell.step("inventory", f"reserved {call['item']} for: {call['caller']}", holds="caller" in call)
    tell.say("intruder", "finds the key in a CI log, and calls from a process of its own")
    intruder.wait_for("ready")
    position = intruder.tell(replay=api_key)
    replayed = intruder.wait_for("replayed", after=position)
    tell.step(
        "inventory",
        "reserved everything for: whoever has the API key. The stolen key works from anywhere",
        holds=not replayed["reason"],
    )
    for actor in (customers, intruder, orders, inventory):
        actor.stop()


# --- act 2 ------------------------------------------------------------------------------------


def with_identities(stage: Stage, api_key: str) -> Cast:
    """Both services become somebody; the key becomes worthless; certificates rotate."""
    tell = stage.timeline
    tell.act("Act 2  With identities: mutual TLS, certificates that live ten seconds")
    tell.command(f"idb dev --dir dev --trust-domain {TRUST_DOMAIN}")
    stage.start_dev()
    authorities = stage.idb("authority", "list", show=False).document["authorities"]
    key_id = next(one["key_id"] for one in authorities if one["kind"] == "x509")
    tell.step(
        "broker",
        f"ready; its CA key never leaves OpenBao ({key_id}, {stage.dev.openbao_address})",
        holds=key_id.startswith("transit:"),
    )
    entry_ids = {name: _register(stage, name) for name in ("inventory", "orders")}

    inventory = stage.actor("inventory", {"allow": ORDERS})
    serving = inventory.wait_for("ready")
    _tell_identity(stage, inventory, "inventory")
    orders = stage.actor("orders", {"inventory": serving["address"], "peer": INVENTORY})
    intruder = stage.actor("intruder", {"inventory": serving["address"]})
    shop = orders.wait_for("ready")["address"]
    _tell_identity(stage, orders, "orders")
    customers = stage.actor("customers", {"orders": shop, "per_second": _ORDERS_PER_SECOND})
    call = inventory.wait_for("call")
    tell.step(
        "inventory",
        f"reserved {call['item']} for: {call['caller']}",
        holds=call["caller"] == ORDERS,
    )
    customers.wait_for("ready")
    _worthless(stage, intruder, api_key)
    cast = Cast(orders, customers, intruder, entry_ids["orders"])
    _rotation(stage, cast, inventory)
    return cast


def _register(stage: Stage, name: str) -> str:
    entry = stage.idb(
        *("entry", "create", "--spiffe-id", f"/{name}"),
        *("--selector", f"unix:uid:{os.getuid()}"),
        *("--selector", f"unix:path:{stage.program(name)}", "--ttl", _SHORT, "--wait"),
    )
    return str(entry.document["id"])


def _tell_identity(stage: Stage, actor: Actor, name: str) -> None:
    identity = actor.wait_for("identity")
    stage.timeline.step(
        name,
        f"is {identity['spiffe_id']}, serial …{identity['serial'][-8:]}, "
        "and has no secret in its environment",
        holds=identity["spiffe_id"].endswith(f"/{name}"),
    )


def _worthless(stage: Stage, intruder: Actor, api_key: str) -> None:
    tell = stage.timeline
    bundle = stage.idb("bundle", "show", show=False).document
    public = {
        "roots": "".join(bundle["x509_authorities_pem"]),
        "peer": INVENTORY,
    }
    intruder.wait_for("ready")
    attempts: tuple[tuple[str, str, Event], ...] = (
        ("the stolen key", "replayed", {"replay": api_key}),
        ("the stolen key over TLS", "replayed", {"replay_tls": api_key, **public}),
        ("a home-made certificate for orders", "forged", {"forge": ORDERS, **public}),
    )
    for what, event, command in attempts:
        position = intruder.tell(**command)
        answer = intruder.wait_for(event, after=position)
        tell.step("intruder", f"tries {what}: refused in the handshake", holds=_refused(answer))
    position = intruder.tell(ask_agent=True)
    asked = intruder.wait_for("asked_agent", after=position)
    tell.step(
        "agent",
        f"gives the intruder's program nothing: {asked['reason']}",
        holds=asked["reason"] == "NO_IDENTITY",
    )


def _refused(answer: Event) -> bool:
    # The handshake ends without an SVID: no handler ran, so there is no reason of a handler's.
    return bool(answer["reason"] == "UNAVAILABLE")


def _rotation(stage: Stage, cast: Cast, inventory: Actor) -> None:
    tell = stage.timeline
    tell.say("customers", f"place {_ORDERS_PER_SECOND} orders a second while certificates rotate")
    actors = {"inventory": inventory, "orders": cast.orders}
    seen = {name: actor.count("identity") for name, actor in actors.items()}
    wanted = {name: count + _ROTATIONS_WANTED for name, count in seen.items()}
    until = time.monotonic() + _ROTATION_SECONDS
    while time.monotonic() < until and any(seen[name] < wanted[name] for name in actors):
        for name, actor in actors.items():
            if actor.count("identity") == seen[name]:
                continue
            identity = actor.last("identity")
            seen[name] = actor.count("identity")
            tell.say(name, f"rotated: new key, new certificate …{identity['serial'][-8:]}")
        stage.rest(0.05)
    position = cast.customers.tell(tally=True)
    tally = cast.customers.wait_for("tally", after=position)
    rotations = {name: seen[name] - 1 for name in actors}
    tell.step(
        "customers",
        f"{tally['placed']} orders, {tally['failed']} failed, while inventory rotated "
        f"{rotations['inventory']} times and orders {rotations['orders']} times",
        holds=tally["placed"] > 0
        and tally["failed"] == 0
        and all(seen[name] >= wanted[name] for name in actors),
    )
    cast.measured = {
        "orders_placed": tally["placed"],
        "orders_failed": tally["failed"],
        "rotations": rotations,
    }


# --- act 3 ------------------------------------------------------------------------------------


def incident(stage: Stage, cast: Cast) -> dict[str, Any]:
    """A certificate with its key gets out; one command ends it."""
    tell = stage.timeline
    tell.act("Act 3  Incident: key and certificate of orders get out")
    rotations = cast.orders.count("identity")
    stage.idb("entry", "update", cast.entry_id, "--ttl", _LONG, show=False)
    identity = _next_identity(stage, cast.orders, rotations)
    left = identity["expires_at"] - time.time()
    tell.say("orders", f"now holds a certificate that is valid for another {left / 60:.0f} min")
    stolen = stage.folder / "core-dump.json"
    cast.orders.tell(copy_out=str(stolen))
    cast.orders.wait_for("copied_out", serial=identity["serial"])
    position = cast.intruder.tell(impersonate=str(stolen), peer=INVENTORY)
    for kind in ("open", "new"):
        cast.intruder.wait_for("served", after=position, connection=kind)
    tell.step(
        "intruder",
        "impersonates orders, on a connection that stays open and on new ones: served",
        holds=True,
    )
    revoke = stage.idb(*("revoke", "--spiffe-id", "/orders", "--reason", "key-compromise", "--yes"))
    revocation = revoke.document["revocation"]
    durable = _moment_of(revocation["committed_at"])
    refused = {
        kind: cast.intruder.wait_for("refused", seconds=15.0, after=position, connection=kind)
        for kind in ("open", "new")
    }
    measured: dict[str, Any] = {"revoked": revocation["revoked"]}
    for kind, words in (("open", "the open connection"), ("new", "a new connection")):
        event = refused[kind]
        after_start = event["at"] - revoke.started
        after_commit = event["at"] - durable
        measured[f"refused_{kind}_connection_after_command_start_seconds"] = round(after_start, 3)
        measured[f"refused_{kind}_connection_after_commit_seconds"] = round(after_commit, 3)
        tell.step(
            "inventory",
            f"refuses {words}: {event['reason']}, {_seconds(max(after_commit, 0.001))} after the "
            f"revocation was durable, {_seconds(after_start)} after it was typed",
            holds=event["reason"] == "PEER_REVOKED",
        )
    measured |= _heard(stage, revocation["id"])
    failed = cast.customers.wait_for("order_failed", seconds=15.0)
    tell.step("orders", f"is refused as well: {failed['reason']}", holds=bool(failed["reason"]))
    _ledger(stage)
    return measured


def _moment_of(written: str) -> float:
    """A time the broker wrote, on this machine's monotonic clock."""
    age = time.time() - datetime.fromisoformat(written).timestamp()
    return time.monotonic() - age


def _heard(stage: Stage, revocation_id: str) -> dict[str, Any]:
    """Who has acknowledged, and the proof of it."""
    tell = stage.timeline
    statement = stage.folder / "statement.json"
    status = stage.idb(
        *("revoke", "status", revocation_id, "--wait", "15s", "--statement", str(statement))
    )
    heard = status.document["propagation"]
    tell.step(
        "broker",
        f"{heard['acknowledged']} verifiers acknowledged it, the last {heard['p99_ms']} ms after "
        f"it was durable; {heard['silent']} silent",
        # orders itself may be gone: its identity ended.
        holds=heard["acknowledged"] > 1 and heard["silent"] == 0 and heard["gone"] <= 1,
    )
    bundle = stage.folder / "bundle.json"
    shown = stage.idb("bundle", "show", "--format", "spiffe", show=False)
    bundle.write_text(json.dumps(shown.document))
    verified = stage.idb("revoke", "verify", str(statement), "--bundle", str(bundle))
    tell.step(
        "auditor",
        "verifies the signed statement of it without the broker",
        holds=bool(verified.document.get("verified")),
    )
    return {"verifiers_told": heard["told"], "verifiers_acknowledged": heard["acknowledged"]}


def _next_identity(stage: Stage, actor: Actor, before_count: int) -> Event:
    until = time.monotonic() + _ROTATION_SECONDS
    while actor.count("identity") == before_count and time.monotonic() < until:
        stage.rest(0.05)
    return actor.last("identity")


def _ledger(stage: Stage) -> None:
    tell = stage.timeline
    arguments = ("credential", "list", "--spiffe-id", "/orders", "--state", "revoked")
    revoked = stage.idb(*arguments).document["credentials"]
    tell.step(
        "ledger",
        f"{len(revoked)} certificates of orders, all revoked: "
        + ", ".join(f"…{one['id'][-8:]}" for one in revoked[:3]),
        holds=bool(revoked) and all(one["reason"] == "key-compromise" for one in revoked),
    )
    node = stage.dev.agent.node_id if stage.dev.agent else ""
    explained = stage.idb("explain", "/orders", "--node", node)
    failed = [
        check["rule"]
        for one in explained.document["explanations"]
        for check in one["checks"]
        if not check["held"]
    ]
    tell.step(
        "broker",
        f"issues no new one, because this does not hold: {'; '.join(failed)}",
        holds=not explained.document["authorized"] and bool(failed),
    )


def _curtain(stage: Stage) -> None:
    tell = stage.timeline
    tell.act(f"Every step held, in {tell.elapsed:.0f} seconds. Now you:")
    for command in (
        "idb dev --dir .dev                  # your own broker and agent; leave it running",
        "idb --dir .dev doctor",
        "idb --dir .dev entry create --spiffe-id /shop/orders --selector unix:uid:$(id -u) --wait",
        "idb --dir .dev svid fetch",
        "idb --help                          # and docs/, which starts with the quickstart",
    ):
        tell.next(command)


def _masked(api_key: str) -> str:
    return f"{api_key[:8]}…{api_key[-4:]}"


def _seconds(span: float) -> str:
    return f"{span:.2f} s" if span >= 1 else f"{span * 1000:.0f} ms"
