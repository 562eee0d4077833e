"""What the agent asks of the node it is: `identity_client.node.NodeKeeper` is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from identity_client.errors import IdentityError
from identity_client.node.values import IssuedJwt, IssuedX509, JwtRequest, X509Request


class Node(Protocol):
    """A node that can order credentials."""

    async def issue_x509(self, orders: Sequence[X509Request]) -> list[IssuedX509 | IdentityError]:
        """Order X.509-SVIDs; the answers are in the order of the orders.

        Raises:
            IdentityError: none was issued.
        """
        ...

    async def issue_jwt(self, orders: Sequence[JwtRequest]) -> list[IssuedJwt | IdentityError]:
        """Order JWT-SVIDs; as `issue_x509`."""
        ...
