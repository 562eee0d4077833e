"""NodeAttestation: how a machine becomes a node, and stays one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Final

from identity_api.broker.v1 import node_attestation_pb2 as pb
from identity_broker.errors import (
    BrokerError,
    BrokerStopping,
    ChallengeFailed,
    MalformedRequest,
)
from identity_broker.lifecycle.attest import Admission, Attest
from identity_broker.lifecycle.rotate import RotateNode
from identity_broker.server.rpc.call import Call
from identity_broker.server.rpc.convert import credentials as convert_credential
from identity_broker.server.rpc.convert import trust as convert_trust
from identity_broker.server.rpc.pipeline import ServiceFunction
from identity_broker.signing import Signing
from identity_broker.telemetry.metrics import Metrics

_RETRY_SECONDS: Final = 1.0


class NodeAttestationService:
    """Attestation on the bootstrap listener, renewal on the mTLS one."""

    def __init__(
        self, attest: Attest, rotate: RotateNode, signing: Signing, metrics: Metrics
    ) -> None:
        self._attest = attest
        self._rotate = rotate
        self._signing = signing
        self._attested = metrics.attested_total

    def functions(self) -> Mapping[str, ServiceFunction]:
        """Full method name to service function."""
        service = "/identity_api.broker.v1.NodeAttestation/"
        return {f"{service}Attest": self.attest, f"{service}Renew": self.renew}

    async def attest(
        self, requests: AsyncIterator[pb.AttestRequest], call: Call
    ) -> AsyncIterator[pb.AttestResponse]:
        """Drive the attestor: challenges out, answers in, the SVID last."""
        first = await _heard(requests, call.stopping)
        if first is None or first.WhichOneof("step") != "begin":
            raise MalformedRequest("the first message must be begin")
        begin = first.begin
        # A metric's labels are a closed set: what strangers name is not one of its values.
        attestor = begin.attestor if begin.attestor in self._attest.attestors else "unknown"
        # The attestor runs beside this generator; a queue of one carries its challenges here.
        challenges: asyncio.Queue[bytes] = asyncio.Queue(1)
        answers: asyncio.Queue[bytes] = asyncio.Queue(1)

        async def challenge(question: bytes) -> bytes:
            await challenges.put(question)
            return await answers.get()

        admission: asyncio.Task[Admission] = asyncio.create_task(
            self._attest.node(
                begin.attestor,
                begin.payload,
                begin.csr,
                challenge,
                call.caller,
                call.correlation_id,
            )
        )
        asked = asyncio.create_task(challenges.get())
        try:
            while True:
                await asyncio.wait({asked, admission}, return_when=asyncio.FIRST_COMPLETED)
                if not asked.done():
                    break
                question = asked.result()
                asked = asyncio.create_task(challenges.get())
                yield pb.AttestResponse(challenge=question)
                answer = await _heard(requests, call.stopping)
                if answer is None or answer.WhichOneof("step") != "challenge_response":
                    raise ChallengeFailed(detail="the node did not answer the challenge")
                await answers.put(answer.challenge_response)
            result = self._result(await admission)
            self._attested.labels(attestor, "OK").inc()
            yield result
        except BrokerError as error:
            self._attested.labels(attestor, error.reason).inc()
            raise
        finally:
            asked.cancel()
            if not admission.cancel() and not admission.cancelled():
                # Fetched here too: this generator may have ended for another reason.
                admission.exception()

    async def renew(self, request: pb.RenewRequest, call: Call) -> pb.RenewResponse:
        """Issue the calling node its next SVID."""
        credential = await self._rotate.renew(call.caller, request.csr, call.correlation_id)
        return pb.RenewResponse(svid=convert_credential.to_x509_svid(credential))

    def _result(self, admission: Admission) -> pb.AttestResponse:
        return pb.AttestResponse(
            result=pb.AttestResponse.Result(
                svid=convert_credential.to_x509_svid(admission.credential),
                bundle=convert_trust.to_bundle(self._signing.bundle),
                reattestable=admission.node.reattestable,
            )
        )


async def _heard(
    requests: AsyncIterator[pb.AttestRequest], stopping: asyncio.Event
) -> pb.AttestRequest | None:
    """What the node says next; None at its end.

    Raises:
        BrokerStopping: the broker drains, and nobody knows when the node would have answered.
    """
    reading = asyncio.ensure_future(anext(requests, None))
    stopped = asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait({reading, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise BrokerStopping(retry_after=_RETRY_SECONDS)
        return reading.result()
    finally:
        stopped.cancel()
        if reading.cancel():
            # The iterator is in use until then, and could not be closed.
            await asyncio.wait({reading})
