"""Envoy's messages: requests read, secrets written.

- The only modules that import Envoy's messages are this one and `service`; they come with the extra
  `envoy` (xds-protos).
- Everything is inline and PEM: Envoy reads no file for it.
- Authorities go through Envoy's SPIFFE certificate validator, one list for each trust domain, so
  that no trust domain's authority can vouch for a member of another.
"""

from __future__ import annotations

import base64
import textwrap
from typing import Any, Final

from envoy.config.core.v3 import base_pb2, extension_pb2
from envoy.extensions.transport_sockets.tls.v3 import (
    common_pb2,
    secret_pb2,
    tls_spiffe_validator_config_pb2,
)
from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message

from identity_broker.agent.sds.resources import (
    CertificateResource,
    ClientWishes,
    Resource,
    ValidationResource,
)
from identity_broker.agent.sds.subscription import Answer, DeltaRequest, Request
from identity_broker.errors import MalformedRequest

TYPE_URL: Final = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
CONTROL_PLANE: Final = "identity-broker"
PLAIN_KEY: Final = "disable_spiffe_cert_validation"
"""In the node's metadata, true: authorities without the SPIFFE validator. SPIRE's name for it."""
CRL_KEY: Final = "certificate_revocation_lists"
"""In the node's metadata, true: the own trust domain's CRLs beside its authorities."""
_VALIDATOR: Final = "envoy.tls.cert_validator.spiffe"


def request_of(message: Any) -> Request:
    """A DiscoveryRequest's content.

    Raises:
        MalformedRequest: it asks for something else than secrets.
    """
    _check_type(message.type_url)
    return Request(
        names=tuple(message.resource_names),
        nonce=message.response_nonce,
        refused=message.HasField("error_detail"),
    )


def delta_request_of(message: Any) -> DeltaRequest:
    """A DeltaDiscoveryRequest's content.

    Raises:
        MalformedRequest: it asks for something else than secrets.
    """
    _check_type(message.type_url)
    return DeltaRequest(
        subscribe=tuple(message.resource_names_subscribe),
        unsubscribe=tuple(message.resource_names_unsubscribe),
        held=dict(message.initial_resource_versions),
        nonce=message.response_nonce,
        refused=message.HasField("error_detail"),
    )


def wishes_of(message: Any) -> ClientWishes | None:
    """What the node's metadata asks for; None where the request names no node."""
    if not message.HasField("node"):
        return None
    fields = message.node.metadata.fields
    # `fields[key]` would add it.
    return ClientWishes(
        plain=PLAIN_KEY in fields and fields[PLAIN_KEY].bool_value,
        crls=CRL_KEY in fields and fields[CRL_KEY].bool_value,
    )


def response_of(answer: Answer) -> Message:
    """A DiscoveryResponse."""
    response: Message = discovery_pb2.DiscoveryResponse(
        version_info=answer.version,
        resources=[_packed(resource) for resource in answer.resources],
        type_url=TYPE_URL,
        nonce=answer.nonce,
        control_plane=base_pb2.ControlPlane(identifier=CONTROL_PLANE),
    )
    return response


def delta_response_of(answer: Answer) -> Message:
    """A DeltaDiscoveryResponse."""
    response: Message = discovery_pb2.DeltaDiscoveryResponse(
        system_version_info=answer.version,
        resources=[
            discovery_pb2.Resource(
                name=resource.name, version=resource.version, resource=_packed(resource)
            )
            for resource in answer.resources
        ],
        type_url=TYPE_URL,
        removed_resources=answer.removed,
        nonce=answer.nonce,
        control_plane=base_pb2.ControlPlane(identifier=CONTROL_PLANE),
    )
    return response


def _check_type(type_url: str) -> None:
    if type_url and type_url != TYPE_URL:
        raise MalformedRequest("this service has secrets alone", hint=f"type_url: {TYPE_URL}")


def _packed(resource: Resource) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(secret_of(resource))
    return packed


def secret_of(resource: Resource) -> Any:
    """A Secret."""
    if isinstance(resource, CertificateResource):
        return secret_pb2.Secret(
            name=resource.name,
            tls_certificate=common_pb2.TlsCertificate(
                certificate_chain=_inline(_certificates_pem(resource.chain)),
                private_key=_inline(_pem("PRIVATE KEY", resource.key)),
            ),
        )
    return secret_pb2.Secret(name=resource.name, validation_context=_validation_context(resource))


def _validation_context(resource: ValidationResource) -> Any:
    context = common_pb2.CertificateValidationContext()
    if resource.plain:
        ((_, authorities),) = resource.authorities
        context.trusted_ca.CopyFrom(_inline(_certificates_pem(authorities)))
    else:
        config = tls_spiffe_validator_config_pb2.SPIFFECertValidatorConfig(
            trust_domains=[
                tls_spiffe_validator_config_pb2.SPIFFECertValidatorConfig.TrustDomain(
                    name=trust_domain, trust_bundle=_inline(_certificates_pem(authorities))
                )
                for trust_domain, authorities in resource.authorities
            ]
        )
        validator = extension_pb2.TypedExtensionConfig(name=_VALIDATOR)
        validator.typed_config.Pack(config)
        context.custom_validator_config.CopyFrom(validator)
    if resource.crls:
        context.crl.CopyFrom(_inline("".join(_pem("X509 CRL", der) for der in resource.crls)))
        # They are those of the authorities that sign SVIDs; the roots above publish none here.
        context.only_verify_leaf_cert_crl = True
    return context


def _certificates_pem(certificates: tuple[bytes, ...]) -> str:
    return "".join(_pem("CERTIFICATE", der) for der in certificates)


def _inline(text: str) -> Any:
    return base_pb2.DataSource(inline_bytes=text.encode())


def _pem(label: str, der: bytes) -> str:
    body = "\n".join(textwrap.wrap(base64.b64encode(der).decode(), 64))
    return f"-----BEGIN {label}-----\n{body}\n-----END {label}-----\n"
