# What the broker's own token may do, and nothing else.
# Rendered by: python -m identity_ca.backends.vault.provision --print-policy

# Its X.509 key: read public keys, make a new version, sign.
path "$transit_mount/keys/$x509_key" { capabilities = ["read"] }
path "$transit_mount/keys/$x509_key/rotate" { capabilities = ["update"] }
path "$transit_mount/sign/$x509_key" { capabilities = ["update"] }

# Its JWT key: the same.
path "$transit_mount/keys/$jwt_key" { capabilities = ["read"] }
path "$transit_mount/keys/$jwt_key/rotate" { capabilities = ["update"] }
path "$transit_mount/sign/$jwt_key" { capabilities = ["update"] }

# Have its X.509 key certified below the root, as a CA that may have no CA below itself. Every
# parameter that is constrained is also required: one that is left out is never checked.
# With use_csr_values the subject and the extensions are the request's own. Whoever holds this path
# can therefore make a CA with any name constraints: README.md says how to take it away from the
# running broker.
path "$pki_mount/issuer/$issuer/sign-intermediate" {
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
path "$transit_mount/export/*" { capabilities = ["deny"] }
path "$transit_mount/backup/*" { capabilities = ["deny"] }
path "$transit_mount/keys/+/config" { capabilities = ["deny"] }
path "$pki_mount/issuer/+/sign-self-issued" { capabilities = ["deny"] }
path "$pki_mount/issuer/+/sign-verbatim" { capabilities = ["deny"] }
path "$pki_mount/issuer/+/sign-verbatim/*" { capabilities = ["deny"] }
path "$pki_mount/root/*" { capabilities = ["deny"] }
