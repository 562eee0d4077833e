"""The line every credential lives through, one file a verb.

    attest → authorize → issue → record → rotate → revoke

- `attest` returns an `AttestedNode`; only `authorize` builds a `Grant`; only the CA's issuer builds
  what is prepared; a signature follows a durable record.
- `directory` is what `authorize` knows, in memory.
"""
