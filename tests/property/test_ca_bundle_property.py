"""Any bundle survives its own formats, and order or repetition never changes what is trusted."""

from __future__ import annotations

import json
from datetime import timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from identity_ca.bundle import JwtKey, TrustBundle, parse_bundle_map
from identity_ca.keys import KeyAlgorithm, spki_der
from identity_ca.spiffe_id import TrustDomain
from support.ca_material import TRUST_DOMAIN, der, root_certificate, signing_key

ALGORITHMS = (KeyAlgorithm.EC_P256, KeyAlgorithm.EC_P384, KeyAlgorithm.RSA_2048)

x509_authorities = st.lists(
    st.tuples(st.sampled_from(ALGORITHMS[:2]), st.integers(0, 3)), unique=True, max_size=5
).map(lambda found: tuple(der(root_certificate(algorithm, nth)) for algorithm, nth in found))
jwt_keys = st.lists(
    st.tuples(st.text(min_size=1, max_size=20), st.sampled_from(ALGORITHMS)),
    unique_by=lambda pair: pair[0],
    max_size=5,
).map(
    lambda found: tuple(
        JwtKey(key_id, spki_der(signing_key(algorithm).public_key)) for key_id, algorithm in found
    )
)
bundles = st.builds(
    TrustBundle,
    trust_domain=st.just(TRUST_DOMAIN),
    x509_authorities=x509_authorities,
    jwt_keys=jwt_keys,
    sequence=st.integers(0, 2**64 - 1),
    refresh_hint=st.integers(0, 86_400 * 3650).map(lambda seconds: timedelta(seconds=seconds)),
)


@given(bundles)
@settings(max_examples=100, deadline=None)
def test_spiffe_json_reads_back_the_same(bundle):
    written = bundle.to_spiffe_json()
    assert TrustBundle.from_spiffe_json(TRUST_DOMAIN, written) == bundle


@given(bundles)
@settings(max_examples=60, deadline=None)
def test_jwks_and_pem_read_back_their_halves(bundle):
    assert TrustBundle.from_jwks(TRUST_DOMAIN, bundle.to_jwks()).jwt_keys == bundle.jwt_keys
    if bundle.x509_authorities:
        read = TrustBundle.from_pem(TRUST_DOMAIN, bundle.to_pem())
        assert read.x509_authorities == bundle.x509_authorities


@given(bundles, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_shuffled_keys_trust_the_same(bundle, random):
    document = json.loads(bundle.to_spiffe_json())
    random.shuffle(document["keys"])
    shuffled = TrustBundle.from_spiffe_json(TRUST_DOMAIN, json.dumps(document).encode())
    assert set(shuffled.x509_authorities) == set(bundle.x509_authorities)
    assert set(shuffled.jwt_keys) == set(bundle.jwt_keys)


@given(
    bundles,
    st.lists(
        st.fixed_dictionaries(
            {"kty": st.sampled_from(["AKP", "oct", "ec", ""])}
            | {"use": st.sampled_from(["x509-svid", "jwt-svid", "wit-svid"])}
        )
        | st.fixed_dictionaries(
            {
                "kty": st.sampled_from(["EC", "RSA"]),
                "use": st.text().filter(lambda u: "svid" not in u),
            }
        ),
        max_size=4,
    ),
)
@settings(max_examples=60, deadline=None)
def test_unknown_keys_anywhere_change_nothing(bundle, unknown):
    document = json.loads(bundle.to_spiffe_json())
    document["keys"] = [*unknown, *document["keys"], *unknown]
    read = TrustBundle.from_spiffe_json(TRUST_DOMAIN, json.dumps(document).encode())
    assert read == bundle


@given(st.dictionaries(st.sampled_from(["a.org", "b.org", "c.org"]), bundles))
@settings(max_examples=30, deadline=None)
def test_a_map_never_mixes_its_bundles(found):
    document = {"trust_domains": {n: json.loads(b.to_spiffe_json()) for n, b in found.items()}}
    read = parse_bundle_map(json.dumps(document).encode())
    assert set(read) == {TrustDomain(name) for name in found}
    for name, bundle in found.items():
        theirs = read[TrustDomain(name)]
        assert theirs.trust_domain.name == name
        assert (theirs.x509_authorities, theirs.jwt_keys, theirs.sequence) == (
            bundle.x509_authorities,
            bundle.jwt_keys,
            bundle.sequence,
        )
