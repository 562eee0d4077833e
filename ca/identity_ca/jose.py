"""The strict parts of JOSE that tokens and bundles share: base64url, JSON, JWK.

- One spelling per value: base64url without padding, whitespace or stray bits (RFC 7515 section 2).
- A JSON member that appears twice is an error, not a choice between two readings; so are NaN,
  infinity, lone surrogates and nesting deep enough to exhaust the parser.
- `public_key_of` tells a key it does not know (None: skip it) from a broken one (an error).
- Trouble is a `MalformedJose`; the modules on top turn it into their own refusal.
"""

from __future__ import annotations

import binascii
import json
import math
import re
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from typing import Any, Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

__all__ = [
    "JwkPublicKey",
    "JwtPublicKey",
    "MalformedJose",
    "b64url_decode",
    "b64url_encode",
    "jwk_of",
    "parse_json_object",
    "public_key_of",
    "unsupported_reason",
]

JwtPublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey
"""What the nine algorithms of a JWT-SVID verify with (JWT-SVID section 2.1)."""

JwkPublicKey = JwtPublicKey | ed25519.Ed25519PublicKey
"""What a JWK can hold here; Ed25519 for X.509 authorities only."""

_CURVES: Final[dict[str, ec.EllipticCurve]] = {
    "P-256": ec.SECP256R1(),
    "P-384": ec.SECP384R1(),
    "P-521": ec.SECP521R1(),
}
_CURVE_NAMES: Final = {curve.name: name for name, curve in _CURVES.items()}
_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]*", re.ASCII)

# RFC 7518 section 3.3 asks for at least 2048 bits; above 8192 a key only slows its verifiers down.
_MIN_RSA_BITS: Final = 2048
_MAX_RSA_BITS: Final = 8192
_MIN_RSA_EXPONENT: Final = 65537
_MAX_RSA_EXPONENT_BITS: Final = 64


class MalformedJose(ValueError):
    """Input that is not well-formed; its text names the rule and echoes no input."""


def b64url_encode(raw: bytes) -> str:
    """Base64url without padding (RFC 7515 section 2)."""
    return urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def b64url_decode(text: str) -> bytes:
    """The bytes of a base64url text that is spelled the only way it may be.

    Raises:
        MalformedJose: padding, whitespace, another alphabet, an impossible length, or bits set
            behind the last byte.
    """
    if _BASE64URL.fullmatch(text) is None or len(text) % 4 == 1:
        raise MalformedJose("not base64url without padding")
    try:
        raw = binascii.a2b_base64(
            text.translate(_TO_STANDARD) + "=" * (-len(text) % 4), strict_mode=True
        )
    except binascii.Error as exc:
        raise MalformedJose("not base64url without padding") from exc
    if b64url_encode(raw) != text:
        raise MalformedJose("base64url with stray bits at the end")
    return raw


_TO_STANDARD: Final = str.maketrans("-_", "+/")


def parse_json_object(raw: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8, read strictly (RFC 8259; RFC 7515 section 5.2 on duplicates).

    Raises:
        MalformedJose: anything else, duplicate members at any depth included.
    """
    try:
        text = raw.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
        if "\\u" in text:
            # An escaped lone surrogate is no text; find it here rather than in whoever prints it.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except MalformedJose:
        raise
    except RecursionError as exc:
        raise MalformedJose("nested too deeply") from exc
    except ValueError as exc:
        raise MalformedJose("not JSON in UTF-8") from exc
    if not isinstance(value, dict):
        raise MalformedJose("not a JSON object")
    return value


def jwk_of(public_key: PublicKeyTypes) -> dict[str, str]:
    """The members of a JWK that describe a public key (RFC 7518 section 6, RFC 8037 section 2).

    Raises:
        MalformedJose: a kind of key that has no JWK here.
    """
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        name = _CURVE_NAMES.get(public_key.curve.name)
        if name is None:
            raise MalformedJose("an EC key on a curve without a JWK name")
        size = (public_key.curve.key_size + 7) // 8
        numbers = public_key.public_numbers()
        return {
            "kty": "EC",
            "crv": name,
            "x": b64url_encode(numbers.x.to_bytes(size, "big")),
            "y": b64url_encode(numbers.y.to_bytes(size, "big")),
        }
    if isinstance(public_key, rsa.RSAPublicKey):
        rsa_numbers = public_key.public_numbers()
        return {"kty": "RSA", "n": _uint(rsa_numbers.n), "e": _uint(rsa_numbers.e)}
    if isinstance(public_key, ed25519.Ed25519PublicKey):
        raw = public_key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return {"kty": "OKP", "crv": "Ed25519", "x": b64url_encode(raw)}
    raise MalformedJose("a kind of key without a JWK")


def public_key_of(jwk: Mapping[str, Any]) -> JwkPublicKey | None:
    """The public key a JWK describes, or None where its type or curve is not known here.

    Raises:
        MalformedJose: the type is known and its members are not right, or it holds a private key.
    """
    kty = jwk.get("kty")
    if kty not in ("EC", "RSA", "OKP"):
        return None
    if "d" in jwk:
        raise MalformedJose("a public key set holds private key material")
    try:
        if kty == "EC":
            return _ec_key(jwk)
        if kty == "RSA":
            return _rsa_key(jwk)
        if jwk.get("crv") != "Ed25519":
            return None
        return ed25519.Ed25519PublicKey.from_public_bytes(_member(jwk, "x"))
    except MalformedJose:
        raise
    except ValueError as exc:
        raise MalformedJose("the key's numbers are not a public key") from exc


def unsupported_reason(public_key: object) -> str | None:
    """Why no JWS of the nine JWT-SVID algorithms can be verified with this key, or None if one can.

    EC on P-256, P-384 and P-521; RSA of 2048 to 8192 bits with an exponent of at least 65537.
    """
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        known = public_key.curve.name in _CURVE_NAMES
        return None if known else "an EC key on another curve than P-256, P-384 and P-521"
    if isinstance(public_key, rsa.RSAPublicKey):
        exponent = public_key.public_numbers().e
        if not _MIN_RSA_BITS <= public_key.key_size <= _MAX_RSA_BITS:
            return "an RSA key outside 2048 to 8192 bits"
        if exponent < _MIN_RSA_EXPONENT or exponent.bit_length() > _MAX_RSA_EXPONENT_BITS:
            return "an RSA key with an unusual exponent"
        return None
    return "a key that is neither EC nor RSA"


def _ec_key(jwk: Mapping[str, Any]) -> ec.EllipticCurvePublicKey | None:
    curve = _CURVES.get(_text(jwk, "crv"))
    if curve is None:
        return None
    size = (curve.key_size + 7) // 8
    x, y = _member(jwk, "x"), _member(jwk, "y")
    if len(x) != size or len(y) != size:
        raise MalformedJose("EC coordinates of the wrong length")
    return ec.EllipticCurvePublicNumbers(
        int.from_bytes(x, "big"), int.from_bytes(y, "big"), curve
    ).public_key()


def _rsa_key(jwk: Mapping[str, Any]) -> rsa.RSAPublicKey | None:
    modulus = int.from_bytes(_member(jwk, "n"), "big")
    exponent = int.from_bytes(_member(jwk, "e"), "big")
    if modulus.bit_length() > _MAX_RSA_BITS or exponent.bit_length() > _MAX_RSA_EXPONENT_BITS:
        return None
    return rsa.RSAPublicNumbers(exponent, modulus).public_key()


def _text(jwk: Mapping[str, Any], name: str) -> str:
    value = jwk.get(name)
    if not isinstance(value, str):
        raise MalformedJose(f'"{name}" is missing or not a string')
    return value


def _member(jwk: Mapping[str, Any], name: str) -> bytes:
    return b64url_decode(_text(jwk, name))


def _uint(number: int) -> str:
    return b64url_encode(number.to_bytes(max(1, (number.bit_length() + 7) // 8), "big"))


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise MalformedJose("a JSON member appears twice")
    return members


def _refuse_constant(_: str) -> float:
    raise MalformedJose("NaN and infinity are not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise MalformedJose("a number out of range")
    return value
