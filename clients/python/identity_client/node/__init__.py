"""A node: it proves itself to the broker, keeps its own SVID, and is told what concerns it.

- `identity_client.node.values` are the values; importing them costs no gRPC.
"""
