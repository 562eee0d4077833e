# What `python -m identity_ca.backends.vault.provision` needs: a ceremony's token, not a broker's.

# Mounts and their longest lifetime.
path "sys/mounts" { capabilities = ["read"] }
path "sys/mounts/$transit_mount" { capabilities = ["update"] }
path "sys/mounts/$pki_mount" { capabilities = ["update"] }
path "sys/mounts/$pki_mount/tune" { capabilities = ["read", "update"] }

# The two keys: made and looked at, never signed with.
path "$transit_mount/keys/$x509_key" { capabilities = ["create", "read", "update"] }
path "$transit_mount/keys/$jwt_key" { capabilities = ["create", "read", "update"] }

# The root; OpenBao makes its key and keeps it.
path "$pki_mount/root/generate/internal" { capabilities = ["update"] }

# The broker's policy, its role, and one wrapped secret-id.
path "sys/policies/acl/$policy" { capabilities = ["read", "update"] }
path "sys/auth" { capabilities = ["read"] }
path "sys/auth/$approle_mount" { capabilities = ["update", "sudo"] }
path "auth/$approle_mount/role/$role" { capabilities = ["create", "read", "update"] }
path "auth/$approle_mount/role/$role/role-id" { capabilities = ["read"] }
path "auth/$approle_mount/role/$role/secret-id" {
  capabilities     = ["update"]
  min_wrapping_ttl = "1s"
  max_wrapping_ttl = "24h"
}
