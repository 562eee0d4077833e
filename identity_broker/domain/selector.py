"""Selectors: facts that an attestor vouches for.

- Written "type:value"; the type has no colon, the value may have any number.
- A set of selectors matches when every one of them is among the attested ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from identity_broker.errors import EntryInvalid

MAX_VALUE_BYTES = 1024
_TYPE = re.compile(r"[a-z][a-z0-9_]{0,62}")


@dataclass(frozen=True, slots=True, order=True)
class Selector:
    """One fact, such as `unix:uid:1000`.

    Raises:
        EntryInvalid: the type or the value is malformed.
    """

    type: str
    value: str

    def __post_init__(self) -> None:
        if not _TYPE.fullmatch(self.type):
            raise EntryInvalid(
                f"selector type {self.type[:64]!r} must be lower-case letters, digits and _, "
                "starting with a letter",
                hint='a selector looks like "unix:uid:1000"',
            )
        if not self.value:
            raise EntryInvalid(
                f'a selector is TYPE:VALUE, and "{self.type}" has no value',
                hint='a selector looks like "unix:uid:1000"',
            )
        if len(self.value.encode("utf-8", "surrogatepass")) > MAX_VALUE_BYTES:
            raise EntryInvalid(
                f'the value of a "{self.type}" selector must have 1 to {MAX_VALUE_BYTES} bytes',
                hint='a selector looks like "unix:uid:1000"',
            )
        if not self.value.isprintable():
            raise EntryInvalid(
                f'the value of a "{self.type}" selector holds unprintable characters'
            )

    @classmethod
    def parse(cls, text: str) -> Selector:
        """Read `type:value`.

        Raises:
            EntryInvalid: there is no colon, or a part is malformed.
        """
        kind, colon, value = text.partition(":")
        if not colon:
            raise EntryInvalid(
                f"selector {text[:64]!r} has no colon",
                hint='a selector looks like "unix:uid:1000"',
            )
        return cls(kind, value)

    def __str__(self) -> str:
        return f"{self.type}:{self.value}"
