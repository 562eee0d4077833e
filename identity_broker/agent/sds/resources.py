"""Which secrets a client may ask for by which name, made from what its process may know.

- The names are SPIRE's: "default" is the first identity, a SPIFFE ID that identity; "ROOTCA" and
  "spiffe://<trust domain>" the authorities of one trust domain, "ALL" those of every one known.
- A resource holds one trust domain's authorities beside another's, never merged: what checks a
  peer is told which authorities count for which domain.
- Equal content has an equal version, also after a restart of the agent; a version tells nothing
  about a key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final, TypeAlias

from identity_broker.agent.identity import WorkloadState, X509Identity
from identity_ca.bundle import TrustBundle
from identity_ca.errors import SpiffeIdError
from identity_ca.spiffe_id import TrustDomain

DEFAULT_SVID: Final = "default"
DEFAULT_BUNDLE: Final = "ROOTCA"
ALL_BUNDLES: Final = "ALL"
_SCHEME: Final = "spiffe://"
_VERSION_DIGITS: Final = 32


@dataclass(frozen=True, slots=True)
class ClientWishes:
    """What a client asks for in its node's metadata.

    Attributes:
        plain: authorities as a bare list, for a client without the SPIFFE certificate validator.
        crls: certificate revocation lists beside the authorities of its own trust domain. Envoy's
            SPIFFE certificate validator passes over them in silence, so they come with a bare list.
    """

    plain: bool = False
    crls: bool = False


@dataclass(frozen=True, slots=True)
class CertificateResource:
    """An X.509-SVID with its key.

    Attributes:
        chain: DER, leaf first.
        key: PKCS #8, DER; secret.
    """

    name: str
    spiffe_id: str
    serial: str
    chain: tuple[bytes, ...] = field(repr=False)
    key: bytes = field(repr=False)
    version: str


@dataclass(frozen=True, slots=True)
class ValidationResource:
    """What a peer's certificate is checked against.

    Attributes:
        authorities: DER certificates of each trust domain, by name.
        crls: DER; empty where the client did not ask.
        plain: whether to name no trust domain; there is only one then.
    """

    name: str
    authorities: tuple[tuple[str, tuple[bytes, ...]], ...] = field(repr=False)
    crls: tuple[bytes, ...] = field(repr=False)
    plain: bool
    version: str


Resource: TypeAlias = CertificateResource | ValidationResource
"""One secret, under one name."""


def resources_of(
    state: WorkloadState,
    names: Iterable[str],
    *,
    wildcard: bool = False,
    wishes: ClientWishes = ClientWishes(),
) -> dict[str, Resource]:
    """The resources that are there, of those asked for.

    Args:
        state: what the client's process may know.
        names: as the client spelled them; one that names nothing is left out.
        wildcard: everything, under its full name, beside the names.
        wishes: how the client wants what it gets.
    """
    wanted = {*names, *(_full_names(state) if wildcard else ())}
    found = ((name, _resource(state, name, wishes)) for name in sorted(wanted))
    return {name: resource for name, resource in found if resource is not None}


def _full_names(state: WorkloadState) -> Iterator[str]:
    for identity in state.identities:
        yield identity.spiffe_id
    for bundle in _bundles(state).values():
        yield str(bundle.trust_domain.id)


def _resource(state: WorkloadState, name: str, wishes: ClientWishes) -> Resource | None:
    if name == DEFAULT_SVID:
        return _certificate(name, state.identities[0])
    if name == DEFAULT_BUNDLE:
        return _validation(name, [state.bundle], state, wishes)
    bundles = _bundles(state)
    if name == ALL_BUNDLES:
        return _validation(name, bundles.values(), state, wishes)
    if bundle := bundles.get(_trust_domain_named(name)):
        return _validation(name, [bundle], state, wishes)
    identity = next((each for each in state.identities if each.spiffe_id == name), None)
    return _certificate(name, identity) if identity else None


def _bundles(state: WorkloadState) -> Mapping[str, TrustBundle]:
    """Every bundle known, by name; the own trust domain's is never a federated one."""
    own = str(state.bundle.trust_domain)
    return {**{str(b.trust_domain): b for b in state.federated.values()}, own: state.bundle}


def _trust_domain_named(name: str) -> str:
    """The trust domain that "spiffe://example.org" or "example.org" names; "" where none."""
    try:
        return str(TrustDomain(name.removeprefix(_SCHEME)))
    except SpiffeIdError:
        return ""


def _certificate(name: str, identity: X509Identity) -> CertificateResource:
    return CertificateResource(
        name=name,
        spiffe_id=identity.spiffe_id,
        serial=identity.serial,
        chain=identity.chain,
        key=identity.key,
        # The leaf names the public key: a new key is a new certificate.
        version=_version("certificate", *identity.chain),
    )


def _validation(
    name: str, bundles: Iterable[TrustBundle], state: WorkloadState, wishes: ClientWishes
) -> ValidationResource | None:
    authorities = tuple(
        sorted((str(b.trust_domain), b.x509_authorities) for b in bundles if b.x509_authorities)
    )
    if not authorities:
        return None  # Nobody is to be trusted, which no validation context can say.
    checked = wishes.crls and str(state.bundle.trust_domain) in dict(authorities)
    plain = wishes.plain or checked
    if plain and len(authorities) > 1:
        return None  # In a bare list one trust domain could speak for a member of another.
    crls = state.crls if checked else ()
    if checked and not crls:
        return None  # Rather nothing than a peer that was to be checked and is not.
    parts: list[bytes] = []
    for trust_domain, certificates in authorities:
        parts += [trust_domain.encode(), b"".join(sha256(der).digest() for der in certificates)]
    return ValidationResource(
        name=name,
        authorities=authorities,
        crls=crls,
        plain=plain,
        version=_version("validation", *parts, b"plain" if plain else b"", *crls),
    )


def _version(kind: str, *parts: bytes) -> str:
    digest = sha256(kind.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:_VERSION_DIGITS]
