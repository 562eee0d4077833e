"""What selectors may say: the facts that the attestors of this repository vouch for.

- Checked when an entry is written, and then alone: what is stored already is never refused.
- A selector that no attestor can emit is refused, in the spelling attestors use: an entry that
  holds one would never match, and nobody would say why.
- Types of other attestors are taken as they are once the configuration names them.
- A spelling that is proposed instead of a refused one is always one that would be taken.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Final

from identity_broker.domain.selector import Selector
from identity_broker.errors import EntryInvalid

_MAX_ID: Final = 2**32 - 2  # 2^32 - 1 is "no user" (chown(2)), and nobody's
_MAX_UNIT: Final = 255  # systemd.unit(5)
_MAX_NAME: Final = 256
_SHOWN: Final = 80
_LONGEST_PROPOSED: Final = 200

_DECIMAL: Final = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)
_DIGEST: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_HEX_NUMBER: Final = re.compile(r"0|[1-9a-f][0-9a-f]{0,63}", re.ASCII)
_UNIT: Final = re.compile(r"[A-Za-z0-9:_.\\@-]+", re.ASCII)
_SEGMENT: Final = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Form:
    """What follows one key; `mend` guesses what was meant, and may guess wrong."""

    wants: str
    example: str
    accepts: Callable[[str], bool]
    mend: Callable[[str], str] = str.strip


def _is_id(text: str) -> bool:
    return bool(_DECIMAL.fullmatch(text)) and int(text) <= _MAX_ID


def _mend_id(text: str) -> str:
    stripped = text.strip()
    return stripped.lstrip("0") or "0" if stripped.isascii() and stripped.isdigit() else stripped


def _is_name(text: str) -> bool:
    return 0 < len(text) <= _MAX_NAME and ":" not in text and text == text.strip()


def _is_path(text: str) -> bool:
    # What /proc/PID/exe names: absolute, no symbolic link, nothing to fold.
    return text.startswith("/") and text != "/" and text == _mend_path(text)


def _mend_path(text: str) -> str:
    folded = posixpath.normpath(text.strip())
    return folded[1:] if folded.startswith("//") else folded  # POSIX keeps two leading slashes


def _is_digest(text: str) -> bool:
    return bool(_DIGEST.fullmatch(text))


def _mend_digest(text: str) -> str:
    return text.strip().lower().removeprefix("sha256:").replace(":", "")


def _ends(suffix: str) -> Callable[[str], bool]:
    return lambda text: (
        len(text) <= _MAX_UNIT
        and text.endswith(suffix)
        and bool(_UNIT.fullmatch(text[: -len(suffix)]))
    )


def _mend_end(suffix: str) -> Callable[[str], str]:
    return lambda text: text.strip() + suffix


def _is_pair(text: str, sign: str) -> bool:
    key, found, _ = text.partition(sign)
    return bool(found and key) and key == key.strip()


def _is_reference(text: str) -> bool:
    return bool(text) and not any(char.isspace() for char in text)


def _form_of_digest(example: str) -> _Form:
    return _Form("64 lower-case hexadecimal digits", example, _is_digest, _mend_digest)


_ID: Final = _Form("a number up to 4294967294 without leading zeros", "1000", _is_id, _mend_id)
_NAME: Final = _Form("a name without a colon", "www-data", _is_name)
_SHA256: Final = _form_of_digest("9f86d081…")

FORMS: Final[Mapping[str, Mapping[str, _Form]]] = MappingProxyType(
    {
        "unix": {
            "uid": _ID,
            "gid": _ID,
            "supplementary_gid": _ID,
            "user": _NAME,
            "group": _NAME,
            "supplementary_group": _NAME,
            "path": _Form(
                "the absolute path of a program, without symbolic links",
                "/usr/bin/orders",
                _is_path,
                _mend_path,
            ),
            "sha256": _SHA256,
        },
        "systemd": {
            "id": _Form(
                "the name of a service unit",
                "orders.service",
                _ends(".service"),
                _mend_end(".service"),
            ),
            "user_unit": _Form(
                "the name of a service unit of a user's own systemd",
                "orders.service",
                _ends(".service"),
                _mend_end(".service"),
            ),
            "slice": _Form(
                "the name of a slice unit", "system.slice", _ends(".slice"), _mend_end(".slice")
            ),
        },
        "docker": {
            "label": _Form(
                "a label as NAME:VALUE",
                "com.example.app:orders",
                lambda text: _is_pair(text, ":"),
                lambda text: text.strip().replace("=", ":", 1),
            ),
            "env": _Form(
                "an environment variable as NAME=VALUE",
                "STAGE=production",
                lambda text: _is_pair(text, "="),
                lambda text: text.strip().replace(":", "=", 1),
            ),
            "image_id": _Form(
                "an image's name or id", "registry.example.org/orders:1.4", _is_reference
            ),
            "image_digest": _Form(
                '"sha256:" and 64 lower-case hexadecimal digits',
                "sha256:9f86d081…",
                lambda text: (
                    text.startswith("sha256:") and _is_digest(text.removeprefix("sha256:"))
                ),
                lambda text: f"sha256:{_mend_digest(text)}",
            ),
        },
        "join_token": {
            "name": _Form(
                "the name that the node joined under",
                "web-1",
                lambda text: bool(_SEGMENT.fullmatch(text)),
            ),
        },
        "x509_pop": {
            "serial": _Form(
                "a serial number in lower-case hexadecimal digits, without leading zeros",
                "1f3a",
                lambda text: bool(_HEX_NUMBER.fullmatch(text)),
                lambda text: text.strip().lower().replace(":", "").lstrip("0") or "0",
            ),
            "fingerprint": _SHA256,
            "subject:cn": _Form("a common name", "machine-1.example.org", bool),
            "san:dns": _Form("a DNS name", "machine-1.example.org", _is_reference),
            "ca:fingerprint": _SHA256,
        },
    }
)
"""Type → what its values begin with → what follows."""


class SelectorSyntax:
    """What the entries of one broker may ask for.

    Args:
        unchecked_types: types of attestors that are not built in.
    """

    def __init__(self, unchecked_types: Iterable[str] = ()) -> None:
        self._unchecked = frozenset(unchecked_types)

    def check(self, selector: Selector) -> None:
        """Make sure that an attestor could vouch for it.

        Raises:
            EntryInvalid: none could; says what was probably meant.
        """
        if selector.type in self._unchecked:
            return
        forms = FORMS.get(selector.type)
        if forms is None:
            raise self._of_unknown_type(selector)
        key = _key_of(forms, selector.value)
        if key is None:
            raise _of_unknown_key(selector, forms)
        form, rest = forms[key], selector.value[len(key) + 1 :]
        if not form.accepts(rest):
            raise _of_wrong_value(selector, key, form, rest)

    def check_all(self, selectors: Iterable[Selector]) -> None:
        """`check` each, in order.

        Raises:
            EntryInvalid: for the first that fails.
        """
        for selector in sorted(selectors):
            self.check(selector)

    def _of_unknown_type(self, selector: Selector) -> EntryInvalid:
        known = sorted({*FORMS, *self._unchecked})
        meant = self._meant_type(selector, known)
        hint = (
            f'did you mean "{meant}"?'
            if meant
            else f"types: {', '.join(known)}; entries.selector_types in the broker's configuration "
            "adds those of other attestors"
        )
        return EntryInvalid(
            f'no attestor vouches for selectors of type "{selector.type}"', hint=hint
        )

    def _meant_type(self, selector: Selector, known: list[str]) -> str:
        # "uid:1000", without the type before it.
        for kind, forms in FORMS.items():
            if selector.type in forms and _is_good(whole := f"{kind}:{selector}"):
                return whole
        for kind in get_close_matches(selector.type, known, n=1):
            whole = f"{kind}:{selector.value}"
            if kind in self._unchecked or _is_good(whole):
                return whole
        return ""


def _key_of(forms: Mapping[str, _Form], value: str) -> str | None:
    return next((key for key in forms if value.startswith(f"{key}:")), None)


def _of_unknown_key(selector: Selector, forms: Mapping[str, _Form]) -> EntryInvalid:
    key, colon, rest = selector.value.partition(":")
    candidates = [f"{close}:{rest}" for close in get_close_matches(key, forms, n=1) if colon]
    if len(forms) == 1:
        candidates += [f"{only}:{selector.value}" for only in forms]
    wholes = [f"{selector.type}:{candidate}" for candidate in candidates]
    meant = next((f'did you mean "{whole}"? ' for whole in wholes if _is_good(whole)), "")
    keys = ", ".join(forms)
    first, form = next(iter(forms.items()))
    return EntryInvalid(
        f"the {selector.type} attestor does not vouch for {_shown(selector)}",
        hint=f'{meant}a "{selector.type}" selector names one of {keys}, as in '
        f'"{selector.type}:{first}:{form.example}"',
    )


def _of_wrong_value(selector: Selector, key: str, form: _Form, rest: str) -> EntryInvalid:
    meant = f"{selector.type}:{key}:{form.mend(rest)}"
    hint = (
        f'did you mean "{meant}"?'
        if _is_good(meant)
        else f'as in "{selector.type}:{key}:{form.example}"'
    )
    return EntryInvalid(
        f'selector {_shown(selector)}: "{selector.type}:{key}:" wants {form.wants}', hint=hint
    )


def _is_good(text: str) -> bool:
    """Whether it would be taken, and is short enough to be read."""
    if len(text) > _LONGEST_PROPOSED:
        return False
    try:
        selector = Selector.parse(text)
    except EntryInvalid:
        return False
    forms = FORMS.get(selector.type, {})
    key = _key_of(forms, selector.value)
    return key is not None and forms[key].accepts(selector.value[len(key) + 1 :])


def _shown(selector: Selector) -> str:
    text = str(selector)
    return f'"{text}"' if len(text) <= _SHOWN else f'"{text[:_SHOWN]}…"'
