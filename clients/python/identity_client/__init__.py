"""Identity Broker SDK: fetch, rotate and check SPIFFE identities from Python."""
