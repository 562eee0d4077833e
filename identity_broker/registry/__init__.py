"""What operators keep: registration entries, nodes and the tokens they join with.

- Every change is one transaction with its audit event, and is reflected in memory before it
  returns: who changes an entry reads the change.
"""
