"""A Workload API whose every message is the test's: what it says, when it fails, what it breaks.

- Real keys and certificates, of `FakeTrustDomain`; the protocol as the standard has it, header
  included.
- What it was asked is counted by method.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from jwt.algorithms import ECAlgorithm
from spiffe import SpiffeId

from identity_client._wire.workload import (
    JWTSVID,
    SECURITY_HEADER,
    SECURITY_VALUE,
    X509SVID,
    JWTBundlesResponse,
    JWTSVIDResponse,
    ValidateJWTSVIDResponse,
    X509BundlesResponse,
    X509SVIDResponse,
    workload_api_handler,
)
from identity_client.clock import utc_now
from identity_client.credential import X509Material
from identity_client.testing import FakeTrustDomain

_HOUR = timedelta(hours=1)


class ScriptedDomain(FakeTrustDomain):
    """A trust domain that also speaks as a Workload API's messages."""

    def bundle_der(self) -> bytes:
        """Its CA certificates, DER, one after the other."""
        return b"".join(one.public_bytes(Encoding.DER) for one in self.bundle.x509_authorities)

    def offer(self, material: X509Material, *, hint: str = "") -> X509SVID:
        """`material` as it is offered."""
        return X509SVID(
            spiffe_id=str(material.spiffe_id),
            x509_svid=b"".join(one.public_bytes(Encoding.DER) for one in material.svid.cert_chain),
            x509_svid_key=material.svid.private_key.private_bytes(
                Encoding.DER, PrivateFormat.PKCS8, NoEncryption()
            ),
            bundle=self.bundle_der(),
            hint=hint,
        )

    def svid(self, path: str, *, ttl: timedelta = _HOUR) -> X509Material:
        """A fresh X.509-SVID below the trust domain."""
        return self.issue(SpiffeId(f"spiffe://{self.trust_domain.name}{path}"), ttl)

    def crl(
        self, serials: Iterable[str] = (), *, signed_by: ec.EllipticCurvePrivateKey | None = None
    ) -> bytes:
        """A revocation list of the current authority, or one that somebody else signed."""
        now = utc_now()
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._authority.subject)
            .last_update(now)
            .next_update(now + _HOUR)
            .add_extension(x509.CRLNumber(1), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )
        for serial in serials:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(int(serial, 16))
                .revocation_date(now)
                .build()
            )
        return builder.sign(signed_by or self._key, hashes.SHA256()).public_bytes(Encoding.DER)

    def jwks(self) -> bytes:
        """Its JWT keys as a JWK set."""
        import json

        key = ECAlgorithm.to_jwk(self._jwt_key.public_key(), as_dict=True)
        return json.dumps({"keys": [{**key, "kid": "fake-1", "use": "jwt-svid"}]}).encode()


class ScriptedWorkloadApi:
    """Answers what the test last said it should."""

    def __init__(self, domain: ScriptedDomain) -> None:
        self.domain = domain
        self.x509: X509SVIDResponse | None = None
        self.jwt_bundles: JWTBundlesResponse | None = JWTBundlesResponse(
            bundles={domain.trust_domain.as_spiffe_id(): domain.jwks()}
        )
        self.failure: tuple[grpc.StatusCode, str] | None = None
        self.jwt_failure: tuple[grpc.StatusCode, str] | None = None
        self.jwt_ttl = timedelta(minutes=5)
        self.asked: Counter[str] = Counter()
        self.streams = 0
        self._version = 0
        self._changed = asyncio.Condition()

    # --- what a test does ------------------------------------------------------------------------

    async def say(
        self,
        *svids: X509SVID,
        crls: Iterable[bytes] = (),
        federated: Mapping[str, bytes] | None = None,
    ) -> None:
        """The next full state, to every stream."""
        self.x509 = X509SVIDResponse(svids=svids, crl=crls, federated_bundles=federated or {})
        self.failure = None
        await self._tell()

    async def say_jwt_bundles(self, bundles: Mapping[str, bytes]) -> None:
        """The next JWT bundles."""
        self.jwt_bundles = JWTBundlesResponse(bundles=bundles)
        await self._tell()

    async def fail(self, code: grpc.StatusCode, text: str = "") -> None:
        """Ends every stream with `code` and answers every call with it."""
        self.failure = (code, text)
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._version += 1
            self._changed.notify_all()

    # --- the Workload API ------------------------------------------------------------------------

    async def FetchX509SVID(self, request: Any, context: Any) -> AsyncIterator[X509SVIDResponse]:
        await self._begin("FetchX509SVID", context)
        async for _ in self._changes(context):
            if self.x509 is not None:
                yield self.x509

    async def FetchX509Bundles(
        self, request: Any, context: Any
    ) -> AsyncIterator[X509BundlesResponse]:
        await self._begin("FetchX509Bundles", context)
        yield X509BundlesResponse(
            bundles={self.domain.trust_domain.as_spiffe_id(): self.domain.bundle_der()}
        )

    async def FetchJWTSVID(self, request: Any, context: Any) -> JWTSVIDResponse:
        await self._begin("FetchJWTSVID", context)
        if self.jwt_failure is not None:
            await context.abort(*self.jwt_failure)
        svid = self.domain.issue_jwt(
            SpiffeId(request.spiffe_id), list(request.audience), self.jwt_ttl
        )
        return JWTSVIDResponse(svids=[JWTSVID(spiffe_id=request.spiffe_id, svid=svid.token)])

    async def FetchJWTBundles(
        self, request: Any, context: Any
    ) -> AsyncIterator[JWTBundlesResponse]:
        await self._begin("FetchJWTBundles", context)
        if self.jwt_bundles is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no JWT here")
        async for _ in self._changes(context):
            if self.jwt_bundles is not None:
                yield self.jwt_bundles

    async def ValidateJWTSVID(self, request: Any, context: Any) -> ValidateJWTSVIDResponse:
        await self._begin("ValidateJWTSVID", context)
        return ValidateJWTSVIDResponse()

    async def _begin(self, method: str, context: Any) -> None:
        self.asked[method] += 1
        if dict(context.invocation_metadata()).get(SECURITY_HEADER) != SECURITY_VALUE:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the security header is missing")
        if self.failure is not None:
            await context.abort(*self.failure)

    async def _changes(self, context: Any) -> AsyncIterator[None]:
        self.streams += 1
        try:
            while True:
                version = self._version
                if self.failure is not None:
                    await context.abort(*self.failure)
                yield
                async with self._changed:
                    while self._version == version:
                        await self._changed.wait()
        finally:
            self.streams -= 1


@asynccontextmanager
async def serving(api: ScriptedWorkloadApi, target: str | Path) -> AsyncIterator[grpc.aio.Server]:
    """Serves `api` on a Unix socket's path, or on any address of gRPC's."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((workload_api_handler(api),))
    server.add_insecure_port(f"unix:{target}" if isinstance(target, Path) else target)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)
