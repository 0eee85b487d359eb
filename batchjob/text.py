"""Text that people and files may see: signatures, passwords and tokens taken out, terminal controls made visible.

All messages of our exceptions and of error rows pass here when they are made, all that is printed once more.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from urllib.parse import parse_qsl, quote, urlsplit

__all__ = [
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
]

_GONE = "…"
_SIGNING = (
    "(?:x-[a-z0-9]+-|q-)?(?:signature|credential|security-token)|googleaccessid|awsaccesskeyid|ossaccesskeyid|q-ak|sig"
    "|(?:access_|refresh_|id_|auth_)?token|(?:x-)?api[-_]?key|subscription-key|password|passwd|pwd|secret"
)
_CARRIES = re.compile(rf"(?:{_SIGNING})\Z", re.IGNORECASE)
_CONTAINERS = {"abfs", "abfss"}  # what stands before their '@' is a container, not a person
_SHAPES = (
    (re.compile(r"(?<!abfs://)(?<!abfss://)(?<=://)[^/?#\s]*@"), rf"{_GONE}@"),
    (re.compile(rf"([?&;](?:{_SIGNING})=)(?:(?!:\s)[^&\s'\"<>,;])+", re.IGNORECASE), rf"\1{_GONE}"),
    (re.compile(r"\b((?:Bearer|Basic)\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), rf"\1{_GONE}"),
    (re.compile(r"\b((?:proxy-)?authorization\s*[:=]\s*)[^\r\n]+", re.IGNORECASE), rf"\1{_GONE}"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), _GONE),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), _GONE),
)
_HINTS = ("@", "=", "earer", "asic", "EARER", "ASIC", "uthorization", "AKIA", "ASIA", "PRIVATE KEY")
# Variables whose values are secret by their names, but for those that only say where or how.
_SECRET_NAME = re.compile(
    r"SECRET|TOKEN(?!S|IZ)|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|ACCOUNT_?KEY|SAS_KEY|PRIVATE_KEY", re.IGNORECASE
)
_NO_SECRET = re.compile(r"_(?:FILE|PATH|DIR|MODE|URL|URI|ENDPOINT|PROVIDER|APPLICATION_CREDENTIALS)\Z", re.IGNORECASE)
_SHORTEST = 8  # what is shorter is a word, and would be found everywhere
_UNMISTAKABLE = 16  # from here on a match is no accident


def redact_secrets(text: str) -> str:
    """The text without user information, signatures and tokens, and without the environment's secret values."""
    if any(hint in text for hint in _HINTS):
        for shape, instead in _SHAPES:
            text = shape.sub(instead, text)
    for _, value in _environment(_SHORTEST):
        for spelled in (value, quote(value, safe="")):
            if spelled in text:
                text = text.replace(spelled, _GONE)
    return text


def escape_controls(text: str) -> str:
    r"""The text as a terminal may print it: controls, and what turns the direction of writing, appear as `\x1b`."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
    )


def sanitize(text: str) -> str:
    """Both: the text as a message, a row or a log may hold it."""
    return escape_controls(redact_secrets(text))


def redact_queries(text: str) -> str:
    """What was typed as it may be printed: without user information and without any query, whatever it holds."""
    return re.sub(r"(://[^?\s]*\?)\S+", rf"\1{_GONE}", redact_secrets(text))


def redact_assignment(name: str, value: str) -> str:
    """`name=value` as somebody typed it and may read it again: nothing of a value that is secret by its name."""
    return f"{name}={_GONE if _SECRET_NAME.search(name) else redact_queries(value)}"


def explain_uri_secret(uri: str) -> str | None:
    """Why a URI may not stand in a job or a plan, as the rest of a sentence; None where it may."""
    try:
        parts = urlsplit(uri)
    except ValueError:  # an unclosed bracket: whoever reads it says so
        return None
    if "@" in parts.netloc and parts.scheme.lower() not in _CONTAINERS:
        return "holds credentials before '@'; a job never does: give them through the environment"
    if any(_CARRIES.match(key) for key, _ in parse_qsl(parts.query.replace(";", "&"), keep_blank_values=True)):
        return "is a presigned URL; a job never holds a signature: give credentials through the environment"
    return None


def find_held_secret(text: str) -> str | None:
    """The environment variable whose secret value the text holds."""
    return next((name for name, value in _environment(_UNMISTAKABLE) if value in text), None)


def _environment(shortest: int) -> Iterator[tuple[str, str]]:
    for name, value in os.environ.items():
        if len(value) >= shortest and _SECRET_NAME.search(name) and not _NO_SECRET.search(name):
            yield name, value


def closest_match(word: str, names: Sequence[str]) -> str | None:
    """The name that was probably meant."""
    return next(iter(difflib.get_close_matches(word, names, n=1)), None)


def did_you_mean(word: str, names: Sequence[str]) -> str:
    """`; did you mean 'name'?`, or nothing where no name is near."""
    near = closest_match(word, names)
    return f"; did you mean {near!r}?" if near else ""


def format_count(count: int, noun: str) -> str:
    """`1 shard`, `2,000 shards`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
