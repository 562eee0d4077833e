"""Registration entries that contradict themselves cannot be built."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from identity_broker.domain import names
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.selector import Selector
from identity_broker.errors import EntryInvalid
from identity_ca.keys import KeyAlgorithm
from identity_ca.spiffe_id import SpiffeId, TrustDomain

DOMAIN = TrustDomain.parse("example.org")
NODE = names.node_id(DOMAIN, "join_token", "web-1")
ID = SpiffeId.parse("spiffe://example.org/payments/api")


def build(**fields: Any) -> RegistrationEntry:
    values: dict[str, Any] = {
        "id": "e",
        "spiffe_id": ID,
        "parent_id": NODE,
        "selectors": frozenset({Selector("unix", "uid:1000")}),
    }
    return RegistrationEntry(**{**values, **fields})


def test_a_plain_entry_is_fine() -> None:
    assert not build().names_node_group
    assert build(parent_id=names.broker_id(DOMAIN)).names_node_group


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"id": ""}, "entry id"),
        ({"id": "a b"}, "entry id"),
        ({"id": "a" * 65}, "entry id"),
        ({"spiffe_id": DOMAIN.id}, "no path"),
        ({"spiffe_id": SpiffeId.parse("spiffe://example.org/idb/node/x")}, "broker's own"),
        ({"spiffe_id": SpiffeId.parse("spiffe://example.org/IDB/broker")}, "broker's own"),
        ({"parent_id": SpiffeId.parse("spiffe://other.org/a")}, "trust domain"),
        ({"parent_id": DOMAIN.id}, "parent"),
        ({"parent_id": ID}, "own parent"),
        ({"selectors": frozenset()}, "selectors"),
        ({"selectors": frozenset(Selector("unix", f"uid:{n}") for n in range(65))}, "selectors"),
        ({"x509_ttl": timedelta(seconds=9)}, "x509_ttl"),
        ({"x509_ttl": timedelta(hours=25)}, "x509_ttl"),
        ({"jwt_ttl": timedelta(hours=25)}, "jwt_ttl"),
        ({"dns_names": ("UPPER.example",)}, "DNS name"),
        ({"dns_names": ("*.example",)}, "DNS name"),
        ({"dns_names": ("a.example", "a.example")}, "twice"),
        ({"dns_names": ("a" * 64 + ".example",)}, "DNS name"),
        ({"dns_names": ("abc.svid.example.org",)}, "derived"),
        ({"dns_names": tuple(f"h{n}.example" for n in range(33))}, "DNS names"),
        ({"hint": "x" * 1025}, "hint"),
        ({"hint": "line\nbreak"}, "hint"),
        ({"owner": "x" * 257}, "owner"),
        ({"federates_with": (DOMAIN,)}, "federate"),
        ({"federates_with": (TrustDomain.parse("b.org"),) * 2}, "twice"),
        ({"labels": {"no spaces": "x"}}, "label"),
        ({"labels": {"a": "\x07"}}, "label"),
        ({"labels": {f"l{n}": "" for n in range(33)}}, "labels"),
        ({"admin": True, "parent_id": names.broker_id(DOMAIN)}, "administrator"),
        ({"per_process": True, "parent_id": names.broker_id(DOMAIN)}, "no processes"),
        ({"key_algorithm": KeyAlgorithm.RSA_4096}, "rsa-4096"),
        ({"key_algorithm": KeyAlgorithm.ED25519}, "ed25519"),
    ],
)
def test_an_entry_that_contradicts_itself_says_how(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(EntryInvalid) as refused:
        build(**fields)
    assert says in refused.value.public


@pytest.mark.parametrize("text", ["", "unix", ":uid:1", "Unix:uid:1", "unix:", "unix:\x00", "1x:y"])
def test_a_malformed_selector_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(EntryInvalid):
        Selector.parse(text)


def test_a_selector_keeps_the_colons_of_its_value() -> None:
    selector = Selector.parse("docker:label:app:web")
    assert (selector.type, selector.value) == ("docker", "label:app:web")
    assert str(selector) == "docker:label:app:web"
