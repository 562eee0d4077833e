"""Facts as selectors: only those that an entry could ask for.

- Whatever an entry could not hold (too long, unprintable, not in the selector syntax) matches no
  entry, so it is left out rather than mangled: two facts never become the same selector.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from identity_broker.domain.selector import Selector
from identity_broker.domain.selector_syntax import SelectorSyntax
from identity_broker.errors import EntryInvalid

_SYNTAX: Final = SelectorSyntax()


def selectors_of(kind: str, facts: Iterable[tuple[str, str]]) -> frozenset[Selector]:
    """Return `kind:key:value` for each fact (key, value) that can be a selector."""
    return frozenset(
        selector for key, value in facts if (selector := _selector(kind, f"{key}:{value}"))
    )


def is_wanted(wanted: frozenset[str], keys: frozenset[str]) -> bool:
    """Whether anybody asks for one of the keys; an empty `wanted` asks for everything."""
    return not wanted or not wanted.isdisjoint(keys)


def _selector(kind: str, value: str) -> Selector | None:
    try:
        selector = Selector(kind, value)
        _SYNTAX.check(selector)
    except EntryInvalid:
        return None
    return selector
