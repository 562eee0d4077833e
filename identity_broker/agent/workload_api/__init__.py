"""The SPIFFE Workload API as the node agent serves it on its Unix socket."""
