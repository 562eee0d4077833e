# What the broker's own token may do, and nothing else.
# Rendered by: python -m identity_ca.backends.vault.provision --print-policy

# Its X.509 key: read public keys, make a new version, sign.
path "transit/keys/idb-x509" { capabilities = ["read"] }
path "transit/keys/idb-x509/rotate" { capabilities = ["update"] }
path "transit/sign/idb-x509" { capabilities = ["update"] }

# Its JWT key: the same.
path "transit/keys/idb-jwt" { capabilities = ["read"] }
path "transit/keys/idb-jwt/rotate" { capabilities = ["update"] }
path "transit/sign/idb-jwt" { capabilities = ["update"] }

# Have its X.509 key certified below the root, as a CA that may have no CA below itself. Every
# parameter that is constrained is also required: one that is left out is never checked.
# With use_csr_values the subject and the extensions are the request's own. Whoever holds this path
# can therefore make a CA with any name constraints: README.md says how to take it away from the
# running broker.
path "pki/issuer/idb-root/sign-intermediate" {
  capabilities        = ["update"]
  required_parameters = ["csr", "ttl", "use_csr_values", "max_path_length"]
  allowed_parameters  = {
    csr             = []
    ttl             = []
    use_csr_values  = [true, "true"]
    max_path_length = ["0"]
    format          = ["pem"]
  }
}

# Its own token: is it alive, keep it alive, give it back.
path "auth/token/lookup-self" { capabilities = ["read"] }
path "auth/token/renew-self" { capabilities = ["update"] }
path "auth/token/revoke-self" { capabilities = ["update"] }

# A second policy on the same token may not add these: keys do not leave, and no other CA is made.
path "transit/export/*" { capabilities = ["deny"] }
path "transit/backup/*" { capabilities = ["deny"] }
path "transit/keys/+/config" { capabilities = ["deny"] }
path "pki/issuer/+/sign-self-issued" { capabilities = ["deny"] }
path "pki/issuer/+/sign-verbatim" { capabilities = ["deny"] }
path "pki/issuer/+/sign-verbatim/*" { capabilities = ["deny"] }
path "pki/root/*" { capabilities = ["deny"] }
