"""join_token: whoever holds a token that an operator made is the node it was made for.

- A token is 256 random bits behind the prefix "idbt_"; the store holds its SHA-256 alone.
- It works once, until it expires; unknown, used and expired are refused with the same words.
- The node's half is to send the token: see `identity_client.attestation`.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Final

from identity_broker.attestors.node import Challenger, Evidence
from identity_broker.attestors.node.plugins import NodeAttestorPlugin
from identity_broker.domain.node import AttestedNode, JoinToken
from identity_broker.domain.selector import Selector
from identity_broker.errors import JoinTokenRejected

PREFIX = "idbt_"
_TOKEN = re.compile(rb"idbt_[A-Za-z0-9_-]{43}")


def new_token() -> str:
    """Return a fresh token. Secret."""
    return PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()


def token_hash(token: str) -> str:
    """Return what the store keeps of a token: its SHA-256, hexadecimal.

    A token has 256 random bits, so a plain hash cannot be searched for it.
    """
    return hashlib.sha256(token.encode()).hexdigest()


class JoinTokenAttestor:
    """The broker's half.

    Args:
        consume: marks the token with that hash as used and returns it.
        release: marks it as unused again.
    """

    name = "join_token"

    def __init__(
        self,
        consume: Callable[[str], Awaitable[JoinToken]],
        release: Callable[[str], Awaitable[None]],
    ) -> None:
        self._consume = consume
        self._release = release

    async def attest(self, evidence: Evidence, challenge: Challenger) -> AttestedNode:
        """Spend the token.

        Raises:
            JoinTokenRejected: malformed, unknown, used or expired.
            StoreUnavailable: the database did not answer.
        """
        if not _TOKEN.fullmatch(evidence.payload):
            raise JoinTokenRejected(detail="not in the form of a join token")
        token = await self._consume(token_hash(evidence.payload.decode()))
        name = token.node_id.path.rsplit("/", 1)[-1]
        return AttestedNode(
            spiffe_id=token.node_id,
            attestor=self.name,
            selectors=frozenset({Selector(self.name, f"name:{name}")}),
            reattestable=False,
        )

    async def give_back(self, payload: bytes) -> None:
        """Make the token usable again: no SVID came of it."""
        await self._release(token_hash(payload.decode()))


PLUGIN: Final = NodeAttestorPlugin(
    JoinTokenAttestor.name,
    lambda context, _table: JoinTokenAttestor(context.consume, context.release),
)
