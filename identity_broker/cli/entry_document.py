"""Registration entries in a JSON file, as `idb entry list -o json` prints them.

- A file is taken as a whole: one unknown key or wrong type, and nothing is sent.
- What only the broker sets (held_by, revision, created_at, updated_at) may stand there and is
  ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from identity_broker.cli.errors import FileMalformed
from identity_broker.cli.files import read_input

if TYPE_CHECKING:
    from identity_client.admin import Entry

_IGNORED = frozenset({"held_by", "revision", "created_at", "updated_at"})


def read_entries(path: Path) -> list[Entry]:
    """The entries of a file: a JSON list, or an object with the list under "entries".

    Raises:
        FileUnusable: the file cannot be read, or does not hold that; every problem is named.
    """
    try:
        document = json.loads(read_input(path))
    except ValueError as exc:
        where = f"line {exc.lineno}" if isinstance(exc, json.JSONDecodeError) else "its encoding"
        raise FileMalformed(f'"{path}" is not JSON: {where}') from None
    except RecursionError:
        raise FileMalformed(f'"{path}" is not JSON: it is nested too deeply') from None
    items = document.get("entries") if isinstance(document, dict) else document
    if not isinstance(items, list) or not items:
        raise FileMalformed(
            f'"{path}" does not hold a list of entries',
            hint="idb entry list -o json shows the form",
        )
    problems: list[str] = []
    entries = [_entry(item, f"entries[{index}]", problems) for index, item in enumerate(items)]
    if problems:
        raise FileMalformed(
            f'"{path}" cannot be used',
            hint=f"keys: {', '.join(sorted(_READERS))}",
            problems=tuple(problems),
        )
    return entries


def _entry(item: object, place: str, problems: list[str]) -> Entry:
    from identity_client.admin import Entry

    found: dict[str, Any] = {}
    if not isinstance(item, dict):
        problems.append(f"{place}: must be an object")
        return Entry()
    for key, value in item.items():
        if key in _IGNORED:
            continue
        reader = _READERS.get(key)
        if reader is None:
            problems.append(f"{place}: {key[:64]!r} is not a key of an entry")
            continue
        try:
            found[key.removesuffix("_seconds")] = reader(value)
        except ValueError as exc:
            problems.append(f"{place}.{key}: must be {exc}")
    return Entry(**found)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("a text")  # noqa: TRY004 - collected as a problem, with the key
    return value


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("a list of texts")
    return tuple(value)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")  # noqa: TRY004 - as above
    return value


def _seconds(value: object) -> timedelta | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise ValueError("whole seconds, or null")
    return timedelta(seconds=value)


def _time(value: object) -> datetime | None:
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(_text(value))
    except ValueError:
        raise ValueError("a time such as 2030-01-01T00:00:00Z, or null") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _labels(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ValueError("an object of texts")
    return dict(value)


_READERS: Mapping[str, Callable[[object], Any]] = {
    "id": _text,
    "spiffe_id": _text,
    "parent_id": _text,
    "selectors": _texts,
    "x509_ttl_seconds": _seconds,
    "jwt_ttl_seconds": _seconds,
    "dns_names": _texts,
    "hint": _text,
    "federates_with": _texts,
    "admin": _flag,
    "downstream": _flag,
    "disabled": _flag,
    "expires_at": _time,
    "owner": _text,
    "labels": _labels,
    "per_process": _flag,
    "key_algorithm": _text,
}
