"""Text for people: secrets redacted, control characters escaped, plurals, and "did you mean".

Messages of exceptions and of error rows are sanitized when they are made, and everything that is printed once more.
"""

from __future__ import annotations

import difflib
import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TextIO
from urllib.parse import parse_qsl, quote, urlsplit

__all__ = [
    "TolerantStream",
    "closest_match",
    "did_you_mean",
    "escape_controls",
    "explain_uri_secret",
    "find_held_secret",
    "format_count",
    "redact_assignment",
    "redact_queries",
    "redact_secrets",
    "sanitize",
    "with_article",
]

_REDACTED = "…"
# Names of URL parameters whose values are signatures, keys, tokens or passwords.
_SIGNING_PARAMETERS = (
    "(?:x-[a-z0-9]+-|q-)?(?:signature|credential|security-token)|googleaccessid|awsaccesskeyid|ossaccesskeyid|q-ak|sig"
    "|(?:access_|refresh_|id_|auth_)?token|(?:x-)?api[-_]?key|subscription-key|password|passwd|pwd|secret"
)
_IS_SIGNING_PARAMETER = re.compile(rf"(?:{_SIGNING_PARAMETERS})\Z", re.IGNORECASE)
# Schemes in whose URIs a container, and no user, stands before the '@'.
_CONTAINER_SCHEMES = {"abfs", "abfss", "wasb", "wasbs"}
# Pattern of a secret -> its replacement.
_SECRET_PATTERNS = (
    (re.compile(r"(?<!abfs://)(?<!abfss://)(?<!wasb://)(?<!wasbs://)(?<=://)[^/?#\s]*@"), rf"{_REDACTED}@"),
    (re.compile(rf"([?&;](?:{_SIGNING_PARAMETERS})=)(?:(?!:\s)[^&\s'\"<>,;])+", re.IGNORECASE), rf"\1{_REDACTED}"),
    (re.compile(r"\b((?:Bearer|Basic)\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), rf"\1{_REDACTED}"),
    (re.compile(r"\b((?:proxy-)?authorization\s*[:=]\s*)[^\r\n]+", re.IGNORECASE), rf"\1{_REDACTED}"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), _REDACTED),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), _REDACTED),
)
# Each text that a pattern matches holds one of these; searching for them first is faster.
_HINTS = ("@", "=", "earer", "asic", "EARER", "ASIC", "uthorization", "AKIA", "ASIA", "PRIVATE KEY")

# Environment variables whose values are secret by their names, except those that name a place or a method.
_SECRET_NAME = re.compile(
    r"SECRET|TOKEN(?!S|IZ)|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|ACCOUNT_?KEY|SAS_KEY|PRIVATE_KEY", re.IGNORECASE
)
_NOT_SECRET_NAME = re.compile(
    r"_(?:FILE|PATH|DIR|MODE|URL|URI|ENDPOINT|PROVIDER|APPLICATION_CREDENTIALS)\Z", re.IGNORECASE
)
# Secret values below this length are ordinary words, and would be redacted everywhere.
_MIN_SECRET_LENGTH = 8
# Secret values from this length on are not found in a text by accident.
_UNIQUE_SECRET_LENGTH = 16


def redact_secrets(text: str) -> str:
    """Remove user information, signatures, tokens, and secret values of environment variables from a text."""
    if any(hint in text for hint in _HINTS):
        for pattern, replacement in _SECRET_PATTERNS:
            text = pattern.sub(replacement, text)
    for _, value in _secret_variables(_MIN_SECRET_LENGTH):
        for spelling in (value, quote(value, safe="")):
            if spelling in text:
                text = text.replace(spelling, _REDACTED)
    return text


def escape_controls(text: str) -> str:
    r"""Escape control characters and changes of the writing direction, so that a terminal shows them as `\x1b`."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
    )


def sanitize(text: str) -> str:
    """Redact secrets and escape control characters, for a message, a row or a log."""
    return escape_controls(redact_secrets(text))


def redact_queries(text: str) -> str:
    """Redact secrets and the whole query of each URL, whatever it holds."""
    return re.sub(r"(://[^?\s]*\?)\S+", rf"\1{_REDACTED}", redact_secrets(text))


def redact_assignment(name: str, value: str) -> str:
    """Return `name=value` for people; a value that is secret by its name is not shown at all."""
    return f"{name}={_REDACTED if _SECRET_NAME.search(name) else redact_queries(value)}"


def explain_uri_secret(uri: str) -> str | None:
    """Return the reason why a URI must not be part of a job or a plan, as the rest of a sentence; None if it may."""
    try:
        parts = urlsplit(uri)
    except ValueError:  # an unclosed bracket, which is reported where the URI is read
        return None
    if "@" in parts.netloc and parts.scheme.lower() not in _CONTAINER_SCHEMES:
        return "holds credentials before '@'; a job never does: give them through the environment"
    if any(
        _IS_SIGNING_PARAMETER.match(key) for key, _ in parse_qsl(parts.query.replace(";", "&"), keep_blank_values=True)
    ):
        return "is a presigned URL; a job never holds a signature: give credentials through the environment"
    return None


def find_held_secret(text: str) -> str | None:
    """Return the name of an environment variable whose secret value is in the text; None if there is none."""
    return next((name for name, value in _secret_variables(_UNIQUE_SECRET_LENGTH) if value in text), None)


def closest_match(word: str, names: Sequence[str]) -> str | None:
    """Return the name that was probably meant; None if no name is similar."""
    return next(iter(difflib.get_close_matches(word, names, n=1)), None)


def did_you_mean(word: str, names: Sequence[str]) -> str:
    """Return `; did you mean 'name'?`, or an empty text if no name is similar."""
    match = closest_match(word, names)
    return f"; did you mean {match!r}?" if match else ""


def format_count(count: int, noun: str) -> str:
    """Return a count with its noun: `1 shard`, `2,000 shards`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


class TolerantStream(io.TextIOBase):
    """Text stream that drops what cannot be written: its reader may be gone, its disk full, its terminal closed.

    For progress, on which no run may depend.

    Args:
        stream: Stream to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: it is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        return not self._stream.closed and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


def with_article(noun: str) -> str:
    """Return a noun with its indefinite article: `a str`, `an int`."""
    return f"{'an' if noun[:1].lower() in tuple('aeio') else 'a'} {noun}"


def _secret_variables(min_length: int) -> Iterator[tuple[str, str]]:
    for name, value in os.environ.items():
        if len(value) >= min_length and _SECRET_NAME.search(name) and not _NOT_SECRET_NAME.search(name):
            yield name, value
