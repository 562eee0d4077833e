"""Who is at the other end of a Unix socket, carried to a gRPC server that cannot ask."""
