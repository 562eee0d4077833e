"""What a client subscribed to, what it was sent, what it is owed: both xDS variants, without I/O.

- An answer is owed when what is there differs from what was sent last, and never otherwise. An
  acknowledgement or a refusal changes neither: no client can make the server repeat itself.
- A request that answers an older response than the last one (a stale nonce) changes nothing in the
  state-of-the-world variant: the client will speak again once it has read the newer one.
- A name that names nothing stays subscribed: it is answered when it appears.

Envoy's xDS protocol, "xDS REST and gRPC protocol", sections "ACK/NACK and resource type instance
version", "Incremental xDS" and "Wildcard subscriptions".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from hashlib import sha256
from typing import Final, TypeAlias

from identity_broker.agent.sds.resources import Resource
from identity_broker.errors import MalformedRequest

MAX_NAMES: Final = 512
"""Most names that one stream may subscribe to."""

MAX_NAME_BYTES: Final = 2048
"""A SPIFFE ID's longest form."""

_WILDCARD: Final = "*"
_NONCE: Final = re.compile(r"[1-9][0-9]{0,17}")

Resolve: TypeAlias = Callable[[Iterable[str], bool], Mapping[str, Resource]]
"""From names, and whether everything is wanted beside them, to what is there."""


class Receipt(Enum):
    """What a request says about the responses before it."""

    NOTHING = "nothing"
    ACKNOWLEDGED = "acknowledged"
    REFUSED = "refused"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Request:
    """A DiscoveryRequest.

    Attributes:
        names: all that the client wants from now on.
        nonce: of the response it answers; empty where it answers none.
        refused: whether it refuses that response.
    """

    names: tuple[str, ...] = ()
    nonce: str = ""
    refused: bool = False


@dataclass(frozen=True, slots=True)
class DeltaRequest:
    """A DeltaDiscoveryRequest.

    Attributes:
        subscribe, unsubscribe: changes to what the client wants.
        held: versions of what it has already, by name; counts on the first request only.
        nonce: of the response it answers; empty where it answers none.
        refused: whether it refuses that response.
    """

    subscribe: tuple[str, ...] = ()
    unsubscribe: tuple[str, ...] = ()
    held: Mapping[str, str] = field(default_factory=dict)
    nonce: str = ""
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """A response to send.

    Attributes:
        version: of everything that the client has once it took this.
        removed: names that are there no longer; the incremental variant alone says so.
    """

    nonce: str
    version: str
    resources: tuple[Resource, ...]
    removed: tuple[str, ...] = ()


class _Nonces:
    """The numbers of a stream's responses, and which of them were answered."""

    def __init__(self) -> None:
        self._sent = 0
        self._answered = 0

    def next(self) -> str:
        self._sent += 1
        return str(self._sent)

    def receive(self, nonce: str, *, refused: bool) -> tuple[Receipt, bool]:
        """What the nonce says, and whether it is the last response's."""
        if not nonce:
            return Receipt.NOTHING, False
        number = int(nonce) if _NONCE.fullmatch(nonce) else 0
        last = number == self._sent > 0
        if self._answered < number <= self._sent:
            self._answered = number
            return (Receipt.REFUSED if refused else Receipt.ACKNOWLEDGED), last
        # The last response's nonce again: the client changes what it wants.
        return (Receipt.NOTHING if last else Receipt.STALE), last


class StateOfTheWorld:
    """One stream of StreamSecrets: every response has all that is there."""

    def __init__(self) -> None:
        self._nonces = _Nonces()
        self._names: frozenset[str] = frozenset()
        self._wildcard = False
        self._explicit = False  # names were given once: no names then means nothing
        self._sent: dict[str, str] = {}

    def receive(self, request: Request) -> Receipt:
        """Take a request.

        Raises:
            MalformedRequest: too many names, or too long a one.
        """
        _check_names(request.names)
        receipt, current = self._nonces.receive(request.nonce, refused=request.refused)
        if request.nonce and not current:
            return receipt  # About an older response: its names may be outdated too.
        self._explicit = self._explicit or bool(request.names)
        self._names = frozenset(request.names) - {_WILDCARD}
        self._wildcard = _WILDCARD in request.names or not self._explicit
        return receipt

    def owed(self, resolve: Resolve) -> Answer | None:
        """The response to send now, if any; it counts as sent.

        One without resources says that all that was sent is there no longer. The variant has no
        message for that: the stream is to end.
        """
        there = resolve(self._names, self._wildcard)
        # What the client no longer asks for is forgotten, not missed.
        if not self._wildcard:
            self._sent = {name: v for name, v in self._sent.items() if name in self._names}
        versions = {name: resource.version for name, resource in there.items()}
        if versions == self._sent:
            return None
        self._sent = versions
        return Answer(self._nonces.next(), _overall(versions), tuple(there.values()))


class Incremental:
    """One stream of DeltaSecrets: a response has what changed."""

    def __init__(self) -> None:
        self._nonces = _Nonces()
        self._names: set[str] = set()
        self._wildcard = False
        self._first = True
        # What the client knows: a version, or None where it was told that there is nothing.
        self._known: dict[str, str | None] = {}

    def receive(self, request: DeltaRequest) -> Receipt:
        """Take a request.

        Raises:
            MalformedRequest: too many names, or too long a one.
        """
        for names in (request.subscribe, request.unsubscribe, request.held):
            _check_names(names)
        receipt, _ = self._nonces.receive(request.nonce, refused=request.refused)
        # Subscribed to anew is asked for anew, whatever the client had; only a first request
        # carries on where another stream ended.
        for name in (*request.subscribe, *request.unsubscribe):
            self._known.pop(name, None)
        self._names.update(request.subscribe)
        if self._first and not request.subscribe:
            self._wildcard = True
        if _WILDCARD in request.subscribe:
            self._wildcard = True
        if _WILDCARD in request.unsubscribe:
            self._wildcard = False
        self._names.difference_update(request.unsubscribe)
        self._names.discard(_WILDCARD)
        if self._first:
            self._known.update(request.held)
        self._first = False
        if not self._wildcard:
            self._known = {name: v for name, v in self._known.items() if name in self._names}
        if len(self._names) > MAX_NAMES:
            raise _too_many()
        return receipt

    def owed(self, resolve: Resolve) -> Answer | None:
        """The response to send now, if any; it counts as sent."""
        there = resolve(self._names, self._wildcard)
        changed = [r for name, r in there.items() if self._known.get(name) != r.version]
        absent = {*self._names, *self._known} - there.keys()
        removed = {name for name in absent if self._known.get(name, "") is not None}
        if not changed and not removed:
            return None
        self._known.update({resource.name: resource.version for resource in changed})
        for name in removed:
            if name in self._names:
                self._known[name] = None
            else:
                del self._known[name]
        versions = {name: resource.version for name, resource in there.items()}
        return Answer(
            self._nonces.next(), _overall(versions), tuple(changed), tuple(sorted(removed))
        )

    def withdrawn(self) -> Answer | None:
        """The response that takes everything away, if anything is there; it counts as sent."""
        return self.owed(lambda _names, _wildcard: {})


def _overall(versions: Mapping[str, str]) -> str:
    """One version for a set of resources."""
    lines = (f"{name}\n{version}\n" for name, version in sorted(versions.items()))
    return sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _check_names(names: Iterable[str]) -> None:
    for place, name in enumerate(names):
        if place >= MAX_NAMES:
            raise _too_many()
        if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
            raise MalformedRequest(f"a resource name may have at most {MAX_NAME_BYTES} bytes")


def _too_many() -> MalformedRequest:
    return MalformedRequest(
        f"a stream may subscribe to at most {MAX_NAMES} resources",
        hint="Envoy opens one stream for each; a client may open several, too",
    )
