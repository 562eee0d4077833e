"""Keys of pages: where a page begins.

- A key comes back from a client: what no page can have handed out is `PageTokenInvalid`, whatever
  its length, and never reaches the database.
"""

from __future__ import annotations

from identity_broker.errors import PageTokenInvalid
from identity_ca.errors import SpiffeIdError
from identity_ca.spiffe_id import SpiffeId

_MAX_DIGITS = 18  # fewer than 2^63 has, and far more rows than there will be
_MAX_ID = 64


def row_number(key: str) -> int:
    """The number of a row.

    Raises:
        PageTokenInvalid: it is none.
    """
    if not (len(key) <= _MAX_DIGITS and key.isascii() and key.isdigit()):
        raise PageTokenInvalid
    return int(key)


def entry_id(key: str) -> str:
    """An entry's id, or nothing.

    Raises:
        PageTokenInvalid: no entry can have that id.
    """
    if len(key) > _MAX_ID or not (key.isascii() and key.isprintable()):
        raise PageTokenInvalid
    return key


def node_id(key: str) -> str:
    """A node's SPIFFE ID, or nothing.

    Raises:
        PageTokenInvalid: it is no SPIFFE ID.
    """
    if key:
        try:
            SpiffeId.parse(key)
        except SpiffeIdError as error:
            raise PageTokenInvalid from error
    return key
