"""The demonstration: two services leave their shared API key, in three acts of real processes."""
