"""Values and pure rules: no I/O, no gRPC, no SQL."""
