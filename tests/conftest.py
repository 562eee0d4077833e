"""What every test shares: the fixtures of each component, and how hard Hypothesis looks.

- A component's fixtures live in tests/support/<component>.py and are named below, one line each.
- HYPOTHESIS_PROFILE chooses: `ci` (the same examples every time), `dev` (new ones, fewer), `fuzz`
  (as many as HYPOTHESIS_MAX_EXAMPLES says; `make fuzz`).
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

# Tests start processes beside gRPC's threads; see identity_broker/cli/main.py.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

pytest_plugins: list[str] = [
    # "support.<component>",
    "support.broker",
    "support.line",
    "support.openbao",
    "support.store",
    "support.verbs",
    "support.workload_api",
    "support.workload_contract",
    "support.envoy",
    "support.sds",  # after what it imports, whose asserts pytest rewrites first
]

# No deadline: this machine may be busy, and a slow example is not a wrong one.
_SLOW_IS_FINE = [HealthCheck.too_slow]
settings.register_profile(
    "ci",
    deadline=None,
    max_examples=50,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=_SLOW_IS_FINE,
)
settings.register_profile(
    "dev", deadline=None, max_examples=50, suppress_health_check=_SLOW_IS_FINE
)
settings.register_profile(
    "fuzz",
    deadline=None,
    max_examples=int(os.environ.get("HYPOTHESIS_MAX_EXAMPLES", "20000")),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink],
    print_blob=True,
    suppress_health_check=_SLOW_IS_FINE,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Names a parameter that is key material by its argument.

    Its bytes differ in every process, and pytest-xdist wants the same names in all of them.
    """
    return argname if isinstance(val, bytes) and len(val) > 32 else None
