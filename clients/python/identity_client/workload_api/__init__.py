"""An identity from a SPIFFE Workload API: any node agent's socket, no secret, no broker named.

IdentitySource.from_workload_api()                  # the socket of SPIFFE_ENDPOINT_SOCKET
IdentitySource.from_workload_api("unix:///run/agent/api.sock", hint="internal")
"""
