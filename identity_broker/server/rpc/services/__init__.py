"""The gRPC services: convert, call, convert. One file a service, no rule of its own.

- `functions()` of each service maps full method names to service functions.
"""
