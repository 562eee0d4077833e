"""The node agent: identities for the processes of one machine, over a Unix socket.

- It reaches the broker through the SDK alone, and knows neither its database nor its CA keys.
- What it serves is decided by entries the broker pushed and by what the kernel says of a process.
"""
