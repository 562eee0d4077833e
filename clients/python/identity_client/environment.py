"""Which kind of source the environment describes: a broker to join, or a Workload API to ask.

- A variable that names a broker or a way to join it decides: it was set for this program. Else
  the Workload API of SPIFFE_ENDPOINT_SOCKET, which a whole machine may share.
- IDENTITY_BROKER_SPIFFE_ID says who to be, and IDENTITY_BROKER_REVOCATION_STALENESS what silence
  about revocations means, with either.
"""

from __future__ import annotations

from collections.abc import Mapping

from identity_client._wire.workload import ENDPOINT_VARIABLE
from identity_client.errors import SettingsInvalid
from identity_client.settings import (
    ENVIRONMENT,
    STALENESS,
    SourceSettings,
    settings_from_env,
    staleness_from_env,
)
from identity_client.workload_api.settings import WorkloadApiSettings

__all__ = ["any_settings_from_env"]

_SPIFFE_ID = "IDENTITY_BROKER_SPIFFE_ID"
_EITHER = (_SPIFFE_ID, STALENESS)


def any_settings_from_env(env: Mapping[str, str]) -> SourceSettings | WorkloadApiSettings:
    """Settings from the environment.

    Raises:
        SettingsInvalid: lists every variable that is missing or contradicts another.
    """
    names_a_broker = any(env.get(name) for name in ENVIRONMENT if name not in _EITHER)
    if env.get(ENDPOINT_VARIABLE) and not names_a_broker:
        return WorkloadApiSettings.make(
            spiffe_id=env.get(_SPIFFE_ID) or None, env=env, staleness=staleness_from_env(env)
        )
    try:
        return settings_from_env(env)
    except SettingsInvalid as exc:
        if not names_a_broker:
            exc.hint = f"{ENDPOINT_VARIABLE}=unix:///… is enough where a node agent runs"
        raise
