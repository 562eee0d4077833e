"""What `idb doctor` and `idb server check` look at.

- A check looks and changes nothing: nothing is signed, written, opened or spent.
- Each finding says what was found and, unless all is well, what to do about it.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from identity_broker.cli.output import distance
from identity_broker.cli.revocation_text import count, token_command
from identity_broker.domain.clock import SystemClock
from identity_broker.errors import ConfigError

if TYPE_CHECKING:
    from identity_broker.config.settings import Settings
    from identity_broker.server.probe import Expected
    from identity_client.admin import AdminClient, Credential

_SKEW_WARN = timedelta(seconds=5)
_SKEW_FAIL = timedelta(seconds=60)
_HTTP_TIMEOUT = 5.0
_SAMPLES = 200
_NAMED = 5
_SETTLED = timedelta(seconds=5)
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_PUBLIC_FILES = frozenset({"bundle.pem"})


class Verdict(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was looked at, how it came out, and what to do unless it is ok."""

    check: str
    verdict: Verdict
    detail: str
    fix: str = ""


def check_server(settings: Settings) -> list[str]:
    """Check what a broker with these settings would need; return what was checked.

    Raises:
        ConfigError: a directory cannot be used.
        StoreUnavailable: the database does not answer.
        CAError: the signing backend cannot be used.
    """
    import asyncio

    from identity_broker.server.preflight import check_dependencies

    done = ["configuration"]
    data_dir = settings.server.data_dir
    nearest = next(path for path in (data_dir, *data_dir.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        problem = f"server.data_dir: this user cannot write there ({nearest})"
        raise ConfigError("the broker's directory cannot be used", problems=(problem,))
    done.append("data directory")
    return [*done, *asyncio.run(check_dependencies(settings, SystemClock()))]


def readiness(address: str, now: datetime) -> Iterator[Finding]:
    """Ask /readyz: one finding for each dependency the broker names, and one for the clock."""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=_HTTP_TIMEOUT)
    started = time.monotonic()
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        date = response.getheader("date", "")
        report = json.loads(response.read(1 << 20))
        dependencies = dict(report["dependencies"])
    except (OSError, http.client.HTTPException) as exc:
        fix = "is it running? its log says why not"
        yield Finding("readiness", Verdict.FAIL, f"no answer at {address} ({_why(exc)})", fix)
        return
    except (ValueError, KeyError, TypeError):
        fix = "is server.http_address another program's port?"
        yield Finding("readiness", Verdict.FAIL, f"what answers at {address} is no broker", fix)
        return
    finally:
        connection.close()
    if report.get("stopping"):
        yield Finding("readiness", Verdict.FAIL, "the broker is stopping", "start it again")
    for name, state in sorted(dependencies.items()):
        if state.get("ready"):
            yield Finding(name, Verdict.OK, "answers")
        else:
            message = str(state.get("message", "")) or "does not answer"
            fix = str(state.get("hint", "")) or "the broker's log says why"
            yield Finding(name, Verdict.FAIL, message, fix)
    elapsed = timedelta(seconds=time.monotonic() - started)
    yield from _clock(date, now + elapsed)


def administration(admin: AdminClient, now: datetime) -> Iterator[Finding]:
    """Through the admin API: it answers, and every authority in use has life left."""
    bundle = admin.bundle()
    detail = f'answers for trust domain "{bundle.trust_domain}"'
    yield Finding("admin socket", Verdict.OK, detail)
    authorities = admin.authorities.list()
    for kind in ("x509", "jwt"):
        active = [one for one in authorities if one.kind == kind and one.state == "active"]
        if not active:
            fix = "the broker's log says why it could not make one"
            yield Finding(f"{kind} authority", Verdict.FAIL, "none is active", fix)
        for one in active:
            yield _life(f"{kind} authority", one.not_before, one.expires_at, now)
    yield from _cut_off(admin)
    banned = sum(1 for _ in admin.nodes.list(banned=True))
    if banned:
        fix = "idb node list --banned"
        yield Finding("nodes", Verdict.WARN, f"{banned} banned", fix)


def _cut_off(admin: AdminClient) -> Iterator[Finding]:
    """Nodes that are refused though nobody banned them."""
    found = [one for one in islice(admin.nodes.list(banned=False), _SAMPLES) if one.svid_revoked]
    if not found:
        return
    lost = [one for one in found if not one.reattestable]
    names = ", ".join(one.spiffe_id.rpartition("/")[2] for one in found[:_NAMED])
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    yield Finding(
        "nodes",
        Verdict.WARN,
        f"{count(len(found), 'node')} whose own SVID is revoked: {names}{more}",
        token_command(lost[0].spiffe_id) if lost else "restart the agent: it attests again",
    )


def revocation_status(admin: AdminClient, address: str, now: datetime) -> Iterator[Finding]:
    """Lists, OCSP and ledger, compared as a stranger would see them: one finding for each."""
    from identity_broker.server.probe import StatusProbe

    probe = StatusProbe(address)
    for expected in _expected(admin, now):
        for seen in probe.look(expected, now):
            if seen.problem:
                fix = "the broker's log says why; is the HTTP port the broker's?"
                yield Finding(seen.check, Verdict.FAIL, seen.problem, fix)
            else:
                yield Finding(seen.check, Verdict.OK, seen.detail)


def _expected(admin: AdminClient, now: datetime) -> Iterator[Expected]:
    """What the ledger says of each X.509 authority in use."""
    from identity_broker.server.probe import Expected
    from identity_client.admin import CredentialKind, CredentialQuery, CredentialState

    def sampled(state: CredentialState) -> list[Credential]:
        query = CredentialQuery(states=frozenset({state}), kind=CredentialKind.X509)
        found = islice(admin.credentials.list(query), _SAMPLES)
        # What is about to end, or was revoked this moment, may be said of either way.
        return [
            one
            for one in found
            if one.expires_at is not None
            and one.expires_at - now > _SETTLED
            and (one.revoked_at is None or now - one.revoked_at > _SETTLED)
        ]

    revoked, good = sampled(CredentialState.REVOKED), sampled(CredentialState.ISSUED)
    for authority in admin.authorities.list():
        if authority.kind == "x509" and authority.state != "prepared":
            yield Expected(
                authority.id,
                authority.certificate_chain[0],
                frozenset(int(one.id, 16) for one in revoked if one.authority_id == authority.id),
                tuple(int(one.id, 16) for one in good if one.authority_id == authority.id),
                is_denied=authority.state == "revoked",
            )


def admin_socket(path: Path) -> Iterator[Finding]:
    """The socket's permissions; nothing where it is not there (connecting says that better)."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if mode & stat.S_IRWXO:
        fix = f"chmod o= {path}"
        detail = f"{path} is open to every user ({stat.filemode(mode)})"
        yield Finding("socket permissions", Verdict.FAIL, detail, fix)
    else:
        yield Finding("socket permissions", Verdict.OK, stat.filemode(mode))


def private_files(directory: Path) -> Iterator[Finding]:
    """Files below `directory` that others can read or write, though they may hold keys."""
    open_files = []
    try:
        if directory.stat().st_mode & _OTHERS:
            open_files.append(directory)
        for path in sorted(directory.rglob("*")):
            mode = path.stat(follow_symlinks=False).st_mode
            if stat.S_ISREG(mode) and mode & _OTHERS and _is_private(path, directory):
                open_files.append(path)
    except OSError as exc:
        fix = "run idb doctor as the broker's own user"
        detail = f"{directory} cannot be looked at ({_why(exc)})"
        yield Finding("file permissions", Verdict.WARN, detail, fix)
        return
    for path in open_files:
        detail = f"{path} is open to other users ({stat.filemode(path.stat().st_mode)})"
        yield Finding("file permissions", Verdict.FAIL, detail, f"chmod go= {path}")
    if not open_files:
        yield Finding("file permissions", Verdict.OK, f"{directory} is its owner's alone")


def _is_private(path: Path, directory: Path) -> bool:
    # What lies below a directory that is closed to others cannot be reached by them.
    parents = [parent for parent in path.parents if parent.is_relative_to(directory)]
    reachable = all(parent.stat().st_mode & _OTHERS for parent in parents)
    return reachable and path.name not in _PUBLIC_FILES


def _life(
    check: str, not_before: datetime | None, expires_at: datetime | None, now: datetime
) -> Finding:
    if expires_at is None or not_before is None:
        return Finding(check, Verdict.WARN, "has no expiry", "idb authority list")
    if expires_at <= now:
        fix = "the broker's log says why it was not replaced"
        return Finding(check, Verdict.FAIL, f"expired {distance(expires_at, now)}", fix)
    detail = f"expires {distance(expires_at, now)}"
    if expires_at - now < (expires_at - not_before) / 10:
        fix = "it should have been replaced by now: the broker's log says why not"
        return Finding(check, Verdict.WARN, detail, fix)
    return Finding(check, Verdict.OK, detail)


def _clock(date: str, now: datetime) -> Iterator[Finding]:
    try:
        theirs = email.utils.parsedate_to_datetime(date)
    except (ValueError, TypeError):
        return
    # The header has whole seconds, cut off.
    skew = abs(now - theirs - timedelta(seconds=0.5))
    text = f"differs from the broker's by {skew.total_seconds():.0f} s"
    if skew >= _SKEW_WARN:
        verdict = Verdict.FAIL if skew >= _SKEW_FAIL else Verdict.WARN
        yield Finding("clock", verdict, text, "synchronise both clocks (NTP)")
    else:
        yield Finding("clock", Verdict.OK, "agrees with the broker's")


def _why(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or type(error).__name__).lower()
