"""Administration of a broker: entries, nodes, tokens, the ledger, revocation, authorities.

with AdminClient(UnixTarget(Path("/run/identity-broker/admin.sock"))) as admin:
    for entry in admin.entries.list():
        print(entry.spiffe_id)
"""

from __future__ import annotations

from identity_client.admin.client import (
    AdminClient,
    Authorities,
    Credentials,
    Entries,
    Nodes,
)
from identity_client.admin.revocation_values import (
    Hold,
    HoldTerms,
    IdentityCount,
    Lifted,
    NodeConcerned,
    Propagation,
    Revocation,
    RevocationPlan,
    RevocationState,
    RevocationStatus,
    Revoked,
    Subject,
    SubjectKind,
    Verifier,
    VerifierState,
)
from identity_client.admin.revocations import Revocations
from identity_client.admin.target import MtlsTarget, Target, UnixTarget
from identity_client.admin.values import (
    Applied,
    Authority,
    AuthorityKind,
    AuthorityState,
    Bundle,
    BundleJwtKey,
    Check,
    Credential,
    CredentialKind,
    CredentialQuery,
    CredentialState,
    Entry,
    EntryChange,
    EntryQuery,
    Explanation,
    JoinToken,
    Node,
    Outcome,
    RevocationReason,
)

__all__ = [
    "AdminClient",
    "Applied",
    "Authorities",
    "Authority",
    "AuthorityKind",
    "AuthorityState",
    "Bundle",
    "BundleJwtKey",
    "Check",
    "Credential",
    "CredentialKind",
    "CredentialQuery",
    "CredentialState",
    "Credentials",
    "Entries",
    "Entry",
    "EntryChange",
    "EntryQuery",
    "Explanation",
    "Hold",
    "HoldTerms",
    "IdentityCount",
    "JoinToken",
    "Lifted",
    "MtlsTarget",
    "Node",
    "NodeConcerned",
    "Nodes",
    "Outcome",
    "Propagation",
    "Revocation",
    "RevocationPlan",
    "RevocationReason",
    "RevocationState",
    "RevocationStatus",
    "Revocations",
    "Revoked",
    "Subject",
    "SubjectKind",
    "Target",
    "UnixTarget",
    "Verifier",
    "VerifierState",
]
