"""OpenBao and Vault as key manager and as upstream authority.

From the network inwards:

    wire       one HTTP exchange: timeouts, redirects, size, what came back
    breaker    stops asking a server that is down, and notices when it is back
    session    VaultSession: token, retries and errors around every call
    auth       token, AppRole, Kubernetes, client certificate; renewal in the background
    transit    TransitKeyManager: keys that never leave the server, one pinned version each
    remote_key the same keys as `cryptography` private keys, for its builders
    pki        VaultPkiUpstream: the server's CA signs our intermediate
    policy     the broker's least-privilege policy, rendered for the mounts in use
    provision  sets all of it up with an administrator's token

- hvac and requests are imported here and nowhere else.
- Nothing but `identity_ca.errors` leaves these modules for a failure of the server.
"""
