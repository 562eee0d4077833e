"""Statements of revocations through the door, signed by the JWT authority that is active."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from identity_broker.errors import AuthorityUnavailable
from identity_broker.signing.door import Signing
from identity_ca.statement import sign_statement


async def sign_revocation_statement(signing: Signing, payload: Mapping[str, Any]) -> str:
    """Return the signed statement; see `identity_ca.statement`.

    Raises:
        AuthorityUnavailable: no JWT authority is active, or its key is lost.
        SigningBackendUnavailable: the key manager did not answer.
        PolicyViolation: what is stated is too long.
    """
    authority = signing.authorities.jwt_set.active
    if authority is None:
        raise AuthorityUnavailable("no jwt authority is active", retry_after=5.0)
    return await signing.with_key(
        authority, lambda key: sign_statement(payload, key=key, key_id=authority.id)
    )
