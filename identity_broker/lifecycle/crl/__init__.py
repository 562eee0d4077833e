"""Revocation lists: what stands in them, their numbers and signatures, and when they are told."""
