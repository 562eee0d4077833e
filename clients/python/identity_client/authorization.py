"""Which peers are accepted. Nobody is, unless named.

- Every function that accepts peers takes `authorize`: one SPIFFE ID, several, or a rule from
  here. There is no default, and an empty list accepts nobody.
- Rules compare canonical strings; a prefix ends at a path segment, so "/pay" is not "/payments".
- Names are checked only after the certificate was verified, and a rule sees nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from spiffe import SpiffeId, TrustDomain

from identity_client.credential import BundleSnapshot
from identity_client.errors import PeerRejected
from identity_client.naming import parse_spiffe_id, parse_trust_domain
from identity_client.peer import Peer

__all__ = ["Authorize", "PeerRule", "any_of_trust_domain", "below", "check_allowed", "peer_rule"]

PeerRule: TypeAlias = Callable[[Peer], bool]
"""Whether this peer is accepted; called for every handshake and every call, must not block."""

Authorize: TypeAlias = "str | SpiffeId | Iterable[str | SpiffeId] | PeerRule"


def any_of_trust_domain(trust_domain: str | TrustDomain) -> PeerRule:
    """Accepts every identity of one trust domain.

    Raises:
        SettingsInvalid: not a trust domain.
    """
    prefix = f"spiffe://{parse_trust_domain(trust_domain).name}/"
    return lambda peer: peer.id.startswith(prefix)


def below(prefix: str | SpiffeId) -> PeerRule:
    """Accepts the SPIFFE ID `prefix` and all whose path continues it by whole segments.

    Raises:
        SettingsInvalid: not a SPIFFE ID (leave out a trailing slash).
    """
    exact = str(parse_spiffe_id(prefix))
    start = f"{exact}/"
    return lambda peer: peer.id == exact or peer.id.startswith(start)


def peer_rule(authorize: Authorize) -> PeerRule:
    """The rule that `authorize` stands for.

    Raises:
        SettingsInvalid: a SPIFFE ID in it is not one.
    """
    if isinstance(authorize, (str, SpiffeId)):
        authorize = (authorize,)
    if callable(authorize):
        return authorize
    allowed = frozenset(str(parse_spiffe_id(one)) for one in authorize)
    return lambda peer: peer.id in allowed


def check_allowed(peer: Peer, rule: PeerRule, *, bundle: BundleSnapshot) -> None:
    """Refuses a peer that `rule` does not accept, or that `bundle` cannot speak for.

    A trust domain's keys vouch for its own names and for no other's (X509-SVID section 5.2):
    that holds even where `rule` accepts everybody.

    Raises:
        PeerRejected.
    """
    if peer.trust_domain != bundle.trust_domain.name:
        raise PeerRejected(f'peer "{peer.id}" is not of trust domain "{bundle.trust_domain}"')
    if not rule(peer):
        raise PeerRejected(f'peer "{peer.id}" is not one that is accepted here')
