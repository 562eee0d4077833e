# What `python -m identity_ca.backends.vault.provision` needs: a ceremony's token, not a broker's.

# Mounts and their longest lifetime.
path "sys/mounts" { capabilities = ["read"] }
path "sys/mounts/transit" { capabilities = ["update"] }
path "sys/mounts/pki" { capabilities = ["update"] }
path "sys/mounts/pki/tune" { capabilities = ["read", "update"] }

# The two keys: made and looked at, never signed with.
path "transit/keys/idb-x509" { capabilities = ["create", "read", "update"] }
path "transit/keys/idb-jwt" { capabilities = ["create", "read", "update"] }

# The root; OpenBao makes its key and keeps it.
path "pki/root/generate/internal" { capabilities = ["update"] }

# The broker's policy, its role, and one wrapped secret-id.
path "sys/policies/acl/idb-broker" { capabilities = ["read", "update"] }
path "sys/auth" { capabilities = ["read"] }
path "sys/auth/approle" { capabilities = ["update", "sudo"] }
path "auth/approle/role/idb-broker" { capabilities = ["create", "read", "update"] }
path "auth/approle/role/idb-broker/role-id" { capabilities = ["read"] }
path "auth/approle/role/idb-broker/secret-id" {
  capabilities     = ["update"]
  min_wrapping_ttl = "1s"
  max_wrapping_ttl = "24h"
}
