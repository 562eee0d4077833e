"""What a source of the Workload API needs to know: where it is, and which identity to take."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from spiffe import SpiffeId

from identity_client.naming import parse_spiffe_id
from identity_client.staleness import DEFAULT_STALENESS, StalenessPolicy
from identity_client.workload_api.endpoint import Endpoint

__all__ = ["WorkloadApiSettings"]


@dataclass(frozen=True, slots=True)
class WorkloadApiSettings:
    """Where the Workload API is, and which of a process's identities is meant.

    Attributes:
        endpoint: its address.
        spiffe_id: who to be; None for the first identity that is offered (or that has `hint`).
        hint: the identity's hint as its operator wrote it (Workload API, section 5.2.1); None for
            any.
        rpc_timeout: seconds for one call that is no stream.
        staleness: what it means for peers when nothing is heard about revocations.
    """

    endpoint: Endpoint
    spiffe_id: SpiffeId | None = None
    hint: str | None = None
    rpc_timeout: float = 10.0
    staleness: StalenessPolicy = DEFAULT_STALENESS

    @classmethod
    def make(
        cls,
        endpoint: str | None = None,
        *,
        spiffe_id: str | SpiffeId | None = None,
        hint: str | None = None,
        env: Mapping[str, str] = os.environ,
        staleness: StalenessPolicy = DEFAULT_STALENESS,
    ) -> WorkloadApiSettings:
        """Settings from what people write; the endpoint from `env` when it is not given.

        Raises:
            SettingsInvalid: a value cannot be used, or no endpoint is named.
        """
        return cls(
            endpoint=Endpoint.named(endpoint, env),
            spiffe_id=None if spiffe_id is None else parse_spiffe_id(spiffe_id),
            hint=hint,
            staleness=staleness,
        )
