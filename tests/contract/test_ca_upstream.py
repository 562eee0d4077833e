"""The upstream authorities that need no server, against the contract of all of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from identity_ca.authority_certificate import build_root
from identity_ca.backends.disk import DiskUpstream
from identity_ca.backends.selfsigned import SelfSignedUpstream
from identity_ca.errors import BackendMisconfigured, ProfileViolation
from identity_ca.keys import KeyAlgorithm
from support.ca_material import foreign_ca, key_pem, pem, signing_key, write_private
from support.upstream_contract import TRUST_DOMAIN, UpstreamContract


def a_root(path_length: int):
    return build_root(
        signing_key(),
        trust_domain=TRUST_DOMAIN,
        ttl=timedelta(days=30),
        now=datetime.now(UTC),
        path_length=path_length,
    )


class TestSelfSignedUpstream(UpstreamContract):
    name = "selfsigned"
    self_signed = True
    refusals = (ProfileViolation,)

    @pytest.fixture
    def upstream(self):
        return SelfSignedUpstream()


class TestDiskUpstream(UpstreamContract):
    """A SPIFFE root in files."""

    name = "disk"
    refusals = (BackendMisconfigured,)

    @pytest.fixture
    def upstream(self, tmp_path):
        (tmp_path / "ca.pem").write_bytes(pem(a_root(path_length=1)))
        write_private(tmp_path / "ca.key", key_pem(signing_key()))
        return DiskUpstream(tmp_path / "ca.pem", tmp_path / "ca.key")


class TestDiskUpstreamBelowAnotherPki(UpstreamContract):
    """A sub-CA of an organization's own PKI, two levels below its root, in a file of its own."""

    name = "disk"
    refusals = (BackendMisconfigured,)

    @pytest.fixture
    def upstream(self, tmp_path):
        now = datetime.now(UTC)
        valid: dict[str, Any] = {
            "not_before": now - timedelta(days=1),
            "not_after": now + timedelta(days=365),
        }
        root_key, policy_key, sub_key = (
            signing_key(KeyAlgorithm.RSA_2048),
            signing_key(nth=1),
            signing_key(nth=2),
        )
        root = foreign_ca("Acme Root", root_key, **valid)
        policy = foreign_ca("Acme Policy CA", policy_key, below=(root, root_key), **valid)
        sub = foreign_ca("Acme SPIFFE", sub_key, below=(policy, policy_key), path_length=1, **valid)
        (tmp_path / "ca.pem").write_bytes(pem(sub, policy))
        (tmp_path / "roots.pem").write_bytes(pem(root))
        write_private(tmp_path / "ca.key", key_pem(sub_key))
        return DiskUpstream(tmp_path / "ca.pem", tmp_path / "ca.key", tmp_path / "roots.pem")
