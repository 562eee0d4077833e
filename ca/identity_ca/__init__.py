"""A SPIFFE certificate authority as a library: no gRPC, no SQL, no settings, no threads.

Importing this package does nothing but define names; import the module you need.

Values and rules
    errors        every refusal, with a stable reason                 (start of every `except`)
    spiffe_id     TrustDomain, SpiffeId: strict, immutable
    keys          KeyAlgorithm, SigningKey, KeyManager: what a key may be and who holds it
    serial        serial numbers and token ids: time prefix + 128 random bits
    profile       what each kind of certificate may hold

X.509, in the order a certificate is made
    csr           a request, its proof of possession and its key, nothing else of it
    der           the little DER written and read by hand
    template      the to-be-signed bytes, encoded here
    lint          the same bytes read back and held against profile and SPIFFE, before any key
    issuer        X509Issuer.prepare -> PreparedX509 -> sign -> X509Credential
    authority_certificate
                  roots, intermediates and the requests for them
    chain         validation of an X.509-SVID against a trust bundle
    distribution  where verifiers ask: the names of lists and responder, in certificates and lists
    crl           revocation lists, appended rather than rebuilt
    ocsp          requests read, answers signed; several of each at once
    ocsp_responder
                  the short-lived certificate of the key that signs answers
    ocsp_check    the asker's side: one request, and its answer verified

JWT, trust and its life
    jwt           JwtIssuer and verify_jwt_svid
    jose          base64url, JSON and JWK, read strictly
    jws           the nine signature algorithms of JWT-SVID
    statement     what became of a revocation, signed
    bundle        TrustBundle: SPIFFE JSON, JWKS, PEM
    authority     PREPARED -> ACTIVE -> OLD -> TAINTED -> REVOKED, a pure state machine
    upstream      who certifies our signing key, and the check of what came back
    backends/     memory, file, selfsigned, disk, vault/ (the only code that needs hvac)
"""
