"""A document as YAML that people read: block style, quoted wherever a reader could guess wrong.

- Mappings, lists, strings, whole numbers and booleans; nothing else stands in our documents.
- What is not plainly a word is written as a JSON string, which YAML 1.2 takes as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

_WORD: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
# What some reader takes for something else than a string.
_NO_WORDS: Final = frozenset({"false", "n", "no", "null", "off", "on", "true", "y", "yes"})


def to_yaml(document: Mapping[str, Any]) -> str:
    """The document's text, with the line's end."""
    return "".join(f"{line}\n" for line in _lines(document))


def _lines(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _labelled(f"{_scalar(key)}:", item, indent="  ")
    elif isinstance(value, Sequence) and not isinstance(value, str) and value:
        for item in value:
            # The first line of the item stands beside the dash.
            for place, line in enumerate(_lines(item)):
                yield f"{'  ' if place else '- '}{line}"
    else:
        yield _scalar(value)


def _labelled(label: str, value: Any, *, indent: str) -> Iterator[str]:
    if isinstance(value, str) or not value or not isinstance(value, Mapping | Sequence):
        yield f"{label} {_scalar(value)}"
        return
    yield label
    # A list stands below its key without indentation: its dashes are indentation enough.
    below = "" if isinstance(value, Sequence) else indent
    yield from (f"{below}{line}" for line in _lines(value))


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _WORD.fullmatch(value) and value.lower() not in _NO_WORDS:
        return value
    return json.dumps(value)
