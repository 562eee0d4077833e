"""Which credentials a revocation is about: subjects, and expressions of several terms.

- A selection names something: the empty one, which would be everything, cannot be built.
- `str()` is the one spelling of a selection, and reading it gives the same selection again: SPIFFE
  IDs stand in full, times are absolute.
- All terms must hold. `owner=` and `label.KEY=` are of the entry a credential was issued from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final

from identity_broker.domain import names
from identity_broker.domain.credential import CredentialKind
from identity_broker.domain.duration import parse_duration
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.revocation import MAX_SUBJECT_BYTES, RevocationSubject, SubjectKind
from identity_broker.errors import InvalidSpiffeId, SubjectInvalid
from identity_ca.errors import SpiffeIdError
from identity_ca.spiffe_id import SpiffeId, TrustDomain

MAX_LABEL_TERMS: Final = 32

_LABEL: Final = "label."
_TERM: Final = re.compile(
    r'([a-z-]+|label\.[^\s="]*)=(?:"((?:[^"\\]|\\["\\])*)"|([^\s"]*))(?=\s|\Z)'
)
_ESCAPED: Final = re.compile(r'\\(["\\])')
_SPACE: Final = re.compile(r"\s*")
_BARE: Final = re.compile(r'[^\s"\\]+')
_PREFIX: Final = re.compile(r"/(?:[A-Za-z0-9._-]+/)*[A-Za-z0-9._-]*", re.ASCII)
_ENTRY_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_LABEL_KEY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}", re.ASCII)
_WORD: Final = re.compile(r"[!-~]{1,256}", re.ASCII)
_HEXADECIMAL: Final = re.compile(r"[0-9a-f]+", re.ASCII)
_TIME: Final = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?(?:Z|[+-]\d\d:\d\d)", re.ASCII
)
_SERIAL_DIGITS: Final = 40
_FINGERPRINT_DIGITS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Credentials for which everything given here holds.

    Attributes:
        spiffe_id: the identity; `spiffe_id_prefix`: what it begins with, "spiffe://" included.
        node_id: the node it was issued through; a node's own SVIDs are issued through itself.
        owner, labels: of the entry it was issued from, as the entry is now; labels in the order of
            their keys.
        serial: of an X.509-SVID, 40 lower-case hexadecimal digits; `jti`: of a JWT-SVID.
        issued_after: recorded then or later; `issued_before`: recorded earlier. UTC.

    Raises:
        SubjectInvalid: nothing is given.
    """

    spiffe_id: SpiffeId | None = None
    spiffe_id_prefix: str = ""
    node_id: SpiffeId | None = None
    entry_id: str = ""
    owner: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    kind: CredentialKind | None = None
    instance: str = ""
    authority_id: str = ""
    key_fingerprint: str = ""
    serial: str = ""
    jti: str = ""
    issued_after: datetime | None = None
    issued_before: datetime | None = None

    def __post_init__(self) -> None:
        if not next(self._terms(), None):
            raise SubjectInvalid("an expression that selects nothing would select everything")

    @classmethod
    def of(cls, subject: RevocationSubject) -> Selection:
        """What the subject, canonical as it is, selects.

        Raises:
            SubjectInvalid, InvalidSpiffeId: it was not made by `subject`.
        """
        if subject.kind is SubjectKind.SELECT:
            return _Reader().expression(subject.value)
        return cls(**_Reader().term(_FIELDS[subject.kind], subject.value))

    @property
    def identity(self) -> SpiffeId | None:
        """The identity, when it is all of one identity and nothing less."""
        return self.spiffe_id if self._is_single else None

    @property
    def node(self) -> SpiffeId | None:
        """The node, when it is all of one node: the one to ban."""
        if self.node_id is not None:
            return self.node_id if self._is_single else None
        identity = self.identity
        return identity if identity is not None and names.is_node(identity) else None

    @property
    def _is_single(self) -> bool:
        return len(list(self._terms())) == 1

    @property
    def singles_out(self) -> bool:
        """Whether it names one credential by its own id."""
        return bool(self.serial or self.jti)

    @property
    def names_entry_fields(self) -> bool:
        """Whether it takes a look at entries to know which credentials are meant."""
        return bool(self.owner or self.labels)

    @property
    def is_of_entries(self) -> bool:
        """Whether it can be decided on entries, so that a hold can stop them."""
        return not (
            self.node_id
            or self.kind
            or self.instance
            or self.authority_id
            or self.key_fingerprint
            or self.singles_out
            or self.issued_after
            or self.issued_before
        )

    def covers_entry(self, entry: RegistrationEntry) -> bool | None:
        """Whether all that is issued from the entry is selected; None: not for it to say."""
        if not self.is_of_entries:
            return None
        return (
            (self.spiffe_id is None or self.spiffe_id == entry.spiffe_id)
            and (
                not self.spiffe_id_prefix or str(entry.spiffe_id).startswith(self.spiffe_id_prefix)
            )
            and (not self.entry_id or self.entry_id == entry.id)
            and self.has_fields_of(entry)
        )

    def has_fields_of(self, entry: RegistrationEntry) -> bool:
        """Whether owner and labels, where they are named, are the entry's."""
        return (not self.owner or self.owner == entry.owner) and all(
            entry.labels.get(key) == value for key, value in self.labels
        )

    def __str__(self) -> str:
        return " ".join(f"{name}={_quoted(value)}" for name, value in self._terms())

    def _terms(self) -> Iterator[tuple[str, str]]:
        if self.spiffe_id is not None:
            yield "spiffe-id", str(self.spiffe_id)
        if self.spiffe_id_prefix:
            yield "spiffe-id", f"{self.spiffe_id_prefix}*"
        if self.node_id is not None:
            yield "node", str(self.node_id)
        for key, value in self.labels:
            yield f"{_LABEL}{key}", value
        if self.kind is not None:
            yield "kind", self.kind.value
        for name, text in (
            ("entry", self.entry_id),
            ("owner", self.owner),
            ("instance", self.instance),
            ("authority", self.authority_id),
            ("key", self.key_fingerprint),
            ("serial", self.serial),
            ("jti", self.jti),
        ):
            if text:
                yield name, text
        if self.issued_after is not None:
            yield "issued-after", _to_time(self.issued_after)
        if self.issued_before is not None:
            yield "issued-before", _to_time(self.issued_before)


_FIELDS: Final[Mapping[SubjectKind, str]] = MappingProxyType(
    {
        SubjectKind.SPIFFE_ID: "spiffe-id",
        SubjectKind.SERIAL: "serial",
        SubjectKind.JTI: "jti",
        SubjectKind.NODE: "node",
        SubjectKind.ENTRY: "entry",
        SubjectKind.KEY_FINGERPRINT: "key",
        SubjectKind.AUTHORITY: "authority",
    }
)
"""The term that says the same as a subject."""


def parse_selection(text: str, trust_domain: TrustDomain, now: datetime) -> Selection:
    """Read an expression, such as `spiffe-id=/shop/* kind=x509 issued-after=2h`.

    Args:
        text: terms between spaces; a value with spaces stands in double quotes, in which a
            backslash stands before a quote or a backslash.
        trust_domain: of SPIFFE IDs that are given by their path alone.
        now: what "2h", that long ago, counts from.

    Raises:
        SubjectInvalid: it is no expression; the sentence says which term is wrong.
        InvalidSpiffeId: a SPIFFE ID in it is none, or another trust domain's.
    """
    selection = _Reader(trust_domain, now).expression(text)
    _check_length(str(selection))
    return selection


def subject(
    kind: SubjectKind, value: str, *, trust_domain: TrustDomain, now: datetime
) -> RevocationSubject:
    """What is to be revoked, in its canonical spelling.

    Raises:
        SubjectInvalid: the value does not name such a thing.
        InvalidSpiffeId: it is no SPIFFE ID, or another trust domain's.
    """
    text = value.strip()
    if kind is SubjectKind.SELECT:
        return RevocationSubject(kind, str(parse_selection(text, trust_domain, now)))
    _check_length(text)
    selection = Selection(**_Reader(trust_domain, now).term(_FIELDS[kind], text))
    if selection.spiffe_id_prefix:
        raise SubjectInvalid(
            "one SPIFFE ID is one identity: * names many",
            hint=f"select them: idb revoke --select 'spiffe-id={selection.spiffe_id_prefix}*'",
        )
    ((_, canonical),) = selection._terms()  # noqa: SLF001  # of this module
    return RevocationSubject(kind, canonical)


class _Reader:
    """Reads terms; without a trust domain and a time it takes the canonical spelling alone."""

    def __init__(
        self, trust_domain: TrustDomain | None = None, now: datetime | None = None
    ) -> None:
        self._trust_domain = trust_domain
        self._now = now

    def expression(self, text: str) -> Selection:
        _check_length(text)
        fields: dict[str, Any] = {}
        labels: dict[str, str] = {}
        for name, value in _split(text):
            if name.startswith(_LABEL):
                _add_label(labels, name.removeprefix(_LABEL), value)
                continue
            read = self.term(name, value)
            if fields.keys() & read.keys() or (_ids(fields) and _ids(read)):
                raise SubjectInvalid(f'"{name}" stands twice: one credential cannot be both')
            fields |= read
        if labels:
            fields["labels"] = tuple(sorted(labels.items()))
        return Selection(**fields)

    def term(self, name: str, value: str) -> dict[str, Any]:
        """The field of a `Selection` that a term gives, and its value."""
        readers: dict[str, Callable[[str], dict[str, Any]]] = {
            "spiffe-id": self._spiffe_id,
            "node": self._node,
            "entry": lambda text: {
                "entry_id": _matching(_ENTRY_ID, text, "entry", "an entry's id")
            },
            "owner": lambda text: {"owner": _text(text, "owner")},
            "kind": _kind,
            "instance": lambda text: {"instance": _text(text, "instance")},
            "authority": lambda text: {
                "authority_id": _matching(_WORD, text, "authority", "an authority's id")
            },
            "key": _key,
            "serial": _serial,
            "jti": lambda text: {"jti": _matching(_WORD, text, "jti", "the jti of a JWT-SVID")},
            "issued-after": lambda text: {"issued_after": self._time("issued-after", text)},
            "issued-before": lambda text: {"issued_before": self._time("issued-before", text)},
        }
        read = readers.get(name)
        if read is None:
            raise SubjectInvalid(
                f'"{name[:64]}" is nothing a credential can be selected by',
                hint=f"terms: {', '.join(sorted(readers))}, label.KEY",
            )
        return read(value)

    def _spiffe_id(self, text: str) -> dict[str, Any]:
        if not text.endswith("*"):
            return {"spiffe_id": self._identity(text, "spiffe-id")}
        prefix = text[:-1]
        if prefix.startswith("/") and self._trust_domain is not None:
            prefix = f"{self._trust_domain.id}{prefix}"
        scheme, slashes, rest = prefix.partition("://")
        domain, slash, path = rest.partition("/")
        if not (scheme == "spiffe" and slashes and slash and _PREFIX.fullmatch(f"/{path}")):
            raise InvalidSpiffeId(
                "spiffe-id: what stands before * is not what a SPIFFE ID begins with",
                hint='as in "spiffe-id=/payments/*"',
            )
        self._check_member(domain, "spiffe-id")
        return {"spiffe_id_prefix": prefix}

    def _node(self, text: str) -> dict[str, Any]:
        node_id = self._identity(text, "node")
        if not names.is_node(node_id):
            raise SubjectInvalid(f'"{node_id}" is not a node', hint="idb node list")
        return {"node_id": node_id}

    def _identity(self, text: str, what: str) -> SpiffeId:
        try:
            if text.startswith("/") and self._trust_domain is not None:
                return SpiffeId(self._trust_domain, text)
            spiffe_id = SpiffeId.parse(text)
        except SpiffeIdError as error:
            raise InvalidSpiffeId(f"{what}: {error.message}", hint=error.hint) from error
        if not spiffe_id.path:
            raise InvalidSpiffeId(f"{what}: a trust domain's own ID is never issued")
        self._check_member(spiffe_id.trust_domain.name, what)
        return spiffe_id

    def _check_member(self, domain: str, what: str) -> None:
        if self._trust_domain is not None and domain != self._trust_domain.name:
            raise InvalidSpiffeId(
                f"{what}: this broker issues nothing outside of {self._trust_domain.id}"
            )

    def _time(self, name: str, text: str) -> datetime:
        try:
            if _TIME.fullmatch(text.upper()):
                return datetime.fromisoformat(text.upper()).astimezone(UTC)
            if self._now is not None:
                return (self._now - parse_duration(text)).astimezone(UTC)
        except (ValueError, OverflowError):
            pass  # of a time that no calendar has, or that lies before all calendars
        raise SubjectInvalid(
            f"{name} is a time, or how long ago",
            hint=f'as in "{name}=2026-01-31T03:00:00Z" or "{name}=2h"',
        )


def _ids(fields: Mapping[str, Any]) -> bool:
    return "spiffe_id" in fields or "spiffe_id_prefix" in fields


def _split(text: str) -> Iterator[tuple[str, str]]:
    """The terms of an expression: name and value."""
    place = _SPACE.match(text).end()  # type: ignore[union-attr]  # it matches anything
    while place < len(text):
        term = _TERM.match(text, place)
        if term is None:
            shown = text[place : place + 40].split(maxsplit=1)[0]
            raise SubjectInvalid(
                f"{shown!r} is not TERM=VALUE",
                hint='as in "spiffe-id=/payments/* owner=\\"team a\\" issued-after=2h"',
            )
        name, quoted, bare = term.groups()
        yield name, _ESCAPED.sub(r"\1", quoted) if quoted is not None else bare
        place = _SPACE.match(text, term.end()).end()  # type: ignore[union-attr]  # as above


def _add_label(labels: dict[str, str], key: str, value: str) -> None:
    if not _LABEL_KEY.fullmatch(key):
        raise SubjectInvalid(f"label {key[:64]!r} is not a label name")
    if key in labels:
        raise SubjectInvalid(f'label "{key}" stands twice: it has one value')
    if len(labels) == MAX_LABEL_TERMS:
        raise SubjectInvalid(f"an entry has at most {MAX_LABEL_TERMS} labels")
    labels[key] = _text(value, f"{_LABEL}{key}") if value else value


def _kind(text: str) -> dict[str, Any]:
    try:
        return {"kind": CredentialKind(text)}
    except ValueError:
        raise SubjectInvalid("kind is x509 or jwt") from None


def _key(text: str) -> dict[str, Any]:
    digits = text.lower().removeprefix("sha256:").replace(":", "")
    if len(digits) != _FINGERPRINT_DIGITS or not _HEXADECIMAL.fullmatch(digits):
        raise SubjectInvalid(
            "a key is named by the SHA-256 of its SubjectPublicKeyInfo: 64 hexadecimal digits"
        )
    return {"key_fingerprint": digits}


def _serial(text: str) -> dict[str, Any]:
    digits = text.lower().removeprefix("0x").replace(":", "")
    if not _HEXADECIMAL.fullmatch(digits) or len(digits) > _SERIAL_DIGITS:
        raise SubjectInvalid(
            f"a serial number is at most {_SERIAL_DIGITS} hexadecimal digits",
            hint="idb credential list shows them",
        )
    return {"serial": digits.zfill(_SERIAL_DIGITS)}


def _matching(pattern: re.Pattern[str], text: str, name: str, what: str) -> str:
    if not pattern.fullmatch(text):
        raise SubjectInvalid(f"{name} is not {what}")
    return text


def _text(text: str, name: str) -> str:
    if not text or not text.isprintable():
        raise SubjectInvalid(f"{name} is printable text")
    return text


def _check_length(text: str) -> None:
    if len(text.encode("utf-8", "surrogatepass")) > MAX_SUBJECT_BYTES:
        raise SubjectInvalid(f"what to revoke is named in at most {MAX_SUBJECT_BYTES} bytes")


def _quoted(value: str) -> str:
    if _BARE.fullmatch(value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _to_time(instant: datetime) -> str:
    return instant.astimezone(UTC).isoformat().replace("+00:00", "Z")
