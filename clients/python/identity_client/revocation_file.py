"""What is denied, over a restart: one file in the state directory, written behind.

- At most one write a second, atomic, 0600; what the last second denied may be missing after a
  crash, and the feed tells it again: the sequence in the file is never newer than its denials.
- A file that is damaged, too large, another trust domain's or open to others is ignored, with a
  warning: everything is asked for again then.
- A disk that is full stops nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from spiffe import TrustDomain

from identity_client.clock import utc_now
from identity_client.denials import IdentityEpoch, KeptDenials, Key
from identity_client.errors import SettingsInvalid
from identity_client.revocation import DenySet
from identity_client.revocation_feed import RevocationFollower
from identity_client.state_dir import read_private, write_private

__all__ = ["RevocationMemory"]

_logger = logging.getLogger(__name__)

_FILE: Final = "revocations.json"
_VERSION: Final = 2
_PAUSE_SECONDS: Final = 1.0
_LARGEST_BYTES: Final = 256 * 1024 * 1024
_LATEST_SEQUENCE: Final = 2**64


@dataclass(frozen=True, slots=True)
class _Kept:
    trust_domain: str
    sequence: int
    denials: KeptDenials


class RevocationMemory:
    """The kept denials of one source. Belongs to one event loop.

    Args:
        directory: the state directory, which somebody else has claimed; None keeps nothing.
        trust_domain: whose denials.
        denied: what to keep.
        follower: knows the sequence.
    """

    def __init__(
        self,
        directory: Path | None,
        trust_domain: TrustDomain,
        denied: DenySet,
        follower: RevocationFollower,
    ) -> None:
        self._path = None if directory is None else directory / _FILE
        self._trust_domain = trust_domain.name
        self._denied = denied
        self._follower = follower
        self._changed = asyncio.Event()
        self._saved_sequence = -1
        self._failing = False

    async def load(self) -> None:
        """Denies what was kept, and lets the feed go on from there."""
        if self._path is None:
            return
        kept = await asyncio.to_thread(_load, self._path, self._trust_domain)
        if kept is not None:
            self._denied.restore(kept.denials, now=utc_now())
            self._follower.sequence = self._saved_sequence = kept.sequence

    def changed(self) -> None:
        """Something is to be written."""
        self._changed.set()

    async def run(self) -> None:
        """Writes what changed, at most once a second, until cancelled."""
        while self._path is not None:
            await self._changed.wait()
            await asyncio.sleep(_PAUSE_SECONDS)
            self._changed.clear()
            await self.save()

    async def save(self) -> None:
        """Writes now."""
        if self._path is None:
            return
        kept = _Kept(self._trust_domain, self._follower.sequence, self._denied.keep())
        try:
            await asyncio.to_thread(_save, self._path, kept)
        except SettingsInvalid as error:
            if not self._failing:
                _logger.warning("what is revoked cannot be kept: %s", error)
            self._failing = True
            self._changed.set()  # Tried again.
        else:
            self._failing = False


def _load(path: Path, trust_domain: str) -> _Kept | None:
    try:
        text = read_private(path, most=_LARGEST_BYTES)
        if text is None:
            return None
        kept = _decode(json.loads(text))
    except (
        SettingsInvalid,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as exc:
        why = str(exc) if isinstance(exc, SettingsInvalid) else "it is damaged"
        _logger.warning('the kept revocations "%s" are ignored: %s', path, why)
        return None
    return kept if kept.trust_domain == trust_domain else None


def _save(path: Path, kept: _Kept) -> None:
    write_private(path, json.dumps(_encode(kept), separators=(",", ":")))


def _encode(kept: _Kept) -> dict[str, Any]:
    by_expiry: dict[int, list[str]] = {}
    for key, expires_at in kept.denials.denied.items():
        by_expiry.setdefault(expires_at, []).append(_key_text(key))
    named: dict[str, list[str]] = {}
    for key, name in kept.denials.whose.items():
        named.setdefault(name, []).append(_key_text(key))
    return {
        "version": _VERSION,
        "trust_domain": kept.trust_domain,
        "sequence": kept.sequence,
        "heard_at": kept.denials.heard_at,
        "denied": {str(moment): texts for moment, texts in by_expiry.items()},
        "named": named,
        "epochs": {
            one.spiffe_id: [one.not_before, one.expires_at] for one in kept.denials.epochs.values()
        },
        "authorities": sorted(kept.denials.authorities),
    }


def _decode(document: Any) -> _Kept:
    if document["version"] != _VERSION:
        raise ValueError("unknown version")
    sequence = _whole(document["sequence"])
    if not 0 <= sequence < _LATEST_SEQUENCE:
        raise ValueError("no sequence")
    denied: dict[Key, int] = {}
    for moment, texts in _table(document["denied"]).items():
        expires_at = int(moment)
        for text in texts:
            denied[_key_of(text)] = expires_at
    whose = {
        _key_of(text): name for name, texts in _table(document["named"]).items() for text in texts
    }
    epochs = {
        name: IdentityEpoch(name, _whole(not_before), _whole(expires_at))
        for name, (not_before, expires_at) in _table(document["epochs"]).items()
    }
    return _Kept(
        trust_domain=_text(document["trust_domain"]),
        sequence=sequence,
        denials=KeptDenials(
            denied=denied,
            whose=whose,
            epochs=epochs,
            authorities=tuple(_text(one) for one in document["authorities"]),
            heard_at=float(document["heard_at"]),
        ),
    )


def _key_text(key: Key) -> str:
    return key.hex() if isinstance(key, bytes) else f"={key}"


def _key_of(text: str) -> Key:
    return text[1:] if text.startswith("=") else bytes.fromhex(text)


def _table(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("not a table")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError("not a whole number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value
