"""URIs: plain paths, `file:` URIs, buckets and the web, taken apart in one place; comparison of their spellings.

A plain path is taken literally: `%20` in it is a name of three characters. In a `file:` URI it is a space (RFC 8089).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote, unquote_to_bytes

from batchjob.errors import UnaddressableKey

__all__ = [
    "CLOUD_SCHEMES",
    "encode_path",
    "expand_home",
    "explain_bad_bucket",
    "explain_bad_file_uri",
    "explain_broken_scheme",
    "is_below",
    "is_local",
    "is_within",
    "local_path",
    "local_spelling",
    "lower_scheme",
    "split_chain",
    "suggest_bucket_uri",
    "suggest_scheme",
    "uri_scheme",
]

# URI scheme of a bucket -> provider.
CLOUD_SCHEMES = {
    **dict.fromkeys(("s3", "s3a", "s3n"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gs"),
    **dict.fromkeys(("az", "abfs", "abfss", "wasb", "wasbs"), "az"),
}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# With `:` for access points, `$` and `@` for containers of Azure.
_BUCKET = re.compile(r"[A-Za-z0-9._$@:-]+")
# `s3:/lake`, `s3:lake`, `s3//lake`.
_BROKEN_SCHEME = re.compile(
    rf"({'|'.join((*CLOUD_SCHEMES, 'https', 'http', 'hdfs', 'hf'))})(?::/?(?!/)|//)", re.IGNORECASE
)
_FILE = re.compile(r"file:", re.IGNORECASE)
# Web address of an object in a bucket -> its URI.
_BUCKET_URLS = (
    (r"([^./]+)\.(?:blob|dfs)\.core\.windows\.net/([^/?#]+)/?([^?#]*)", r"abfss://\2@\1.dfs.core.windows.net/\3"),
    (r"s3[.-](?:[a-z0-9-]+\.)?amazonaws\.com/([^/?#]+)/?([^?#]*)", r"s3://\1/\2"),
    (r"([^/]+)\.s3[.-](?:[a-z0-9-]+\.)?amazonaws\.com/([^?#]*)", r"s3://\1/\2"),
    (r"storage\.(?:googleapis|cloud\.google)\.com/([^/?#]+)/?([^?#]*)", r"gs://\1/\2"),
)
_HOME = re.compile(r"\$(?:HOME|\{HOME\})(?=/|\Z)")


def is_local(uri: str) -> bool:
    """Return True if a URI is a plain path or a `file:` URI."""
    return not _SCHEME.match(uri) or _is_file_uri(uri)


def local_path(uri: str) -> Path:
    """Return the path of a local URI. Raises UnaddressableKey for a `file:` URI that names another host or no path.

    For example, `file:/a`, `file:///a` and `FILE://localhost/a` are `/a`; `file:///a%20b` is `/a b`, `/a%20b` itself.
    """
    if not _is_file_uri(uri):
        return Path(uri)
    if reason := explain_bad_file_uri(uri):
        raise UnaddressableKey(f"{uri} {reason}")
    path = "/" + _split_file_uri(uri)[1].lstrip("/")
    return Path(os.fsdecode(unquote_to_bytes(os.fsencode(path))) if "%" in path else path)


def encode_path(path: str) -> str:
    """Return a local path as it is, or as a `file:` URI if it is not UTF-8, which Arrow and Parquet cannot hold.

    For example, the bytes `/in/a\\xff.png` are `file:///in/a%FF.png`, of which `local_path` makes these bytes again.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        return "file://" + quote_from_bytes(os.fsencode(path))
    return path


def local_spelling(name: str, folder: str) -> str:
    """Return the URI of a name below a local folder, in the spelling of the folder.

    For example, `50%.png` below `file:///in/` is `file:///in/50%25.png`, and below `/in/` it is `/in/50%.png`.
    """
    return folder + (name.replace("%", "%25") if _is_file_uri(folder) else name)


def explain_bad_file_uri(uri: str) -> str | None:
    """Return the reason why a `file:` URI cannot be read, as the rest of a sentence; None for every other URI."""
    if not _is_file_uri(uri):
        return None
    host, path = _split_file_uri(uri)
    if host and host.lower() != "localhost":
        return (
            f"names the host {host!r}, and a file: URI is read on this machine only; write file:///folder/name, "
            "or a path without file:"
        )
    if not path.startswith("/"):
        return "names no absolute path; write file:///folder/name, or a path without file:"
    return None


def explain_bad_bucket(bucket: str) -> str | None:
    """Return the reason why a bucket or container cannot have this name, as the rest of a sentence, else None.

    Clients put the name into a host or path as it is, and one of them ends the process over a space.
    """
    if not bucket:
        return "names no bucket"
    if _BUCKET.fullmatch(bucket):
        return None
    return f"names the bucket {bucket!r}, but buckets have only a-z, digits and . - _ in their names; correct it"


def explain_broken_scheme(path: str) -> str | None:
    """Return the reason why a plain path is probably a URI with a slash too few, as the rest of a sentence, else None.

    For example, `s3:/lake/in` and `s3//lake/in` are probably `s3://lake/in`. As paths they would be folders here, which
    an output would write to without a word.
    """
    match = _BROKEN_SCHEME.match(path)
    if match is None:
        return None
    scheme, rest = match[1].lower(), path[match.end() :]
    return f"begins like a URI; write {scheme}://{rest}, or ./{path} if a folder here is meant"


def expand_home(path: str) -> str:
    """Return a path with `~`, `~user`, `$HOME` or `${HOME}` at its beginning replaced by that folder."""
    return os.path.expanduser(_HOME.sub("~", path, count=1) if _HOME.match(path) else path)  # noqa: PTH111 - keeps `//`


def lower_scheme(uri: str) -> str:
    """Return a URI with its scheme in lower case: `S3://Lake/a` is `s3://Lake/a`."""
    match = _SCHEME.match(uri)
    return uri[: match.end()].lower() + uri[match.end() :] if match else uri


def uri_scheme(uri: str) -> str:
    """Return the scheme in lower case: `file` for a `file:` URI, empty for a plain path."""
    match = _SCHEME.match(uri)
    return "file" if _is_file_uri(uri) else match[1].lower() if match else ""


def split_chain(uri: str) -> tuple[str, str]:
    """Split a URI inside an archive: `zip://in/a.png::/x.zip` gives `zip://in/a.png` and `::/x.zip`.

    The second part is empty for every other URI.
    """
    if not _SCHEME.match(uri) or uri_scheme(uri) in (*CLOUD_SCHEMES, "http", "https"):
        return uri, ""
    inner, link, chain = uri.partition("::")
    return inner, link + chain


def is_within(uri: str, prefixes: Sequence[str]) -> bool:
    """Return True if a URI lies below one of the prefixes once its links, `.` and `..` are resolved.

    Of a file in an archive, the archive itself must. In a bucket a key with `.` or `..` never does: clients differ in
    what they make of it.
    """
    place = uri.rpartition("::")[2] if split_chain(uri)[1] else uri
    if is_local(place):
        try:
            place = os.path.realpath(local_path(place))
        except (ValueError, UnaddressableKey):  # Nothing has this name.
            return False
        return any(is_below(place, _resolve_prefix(one)) for one in prefixes if is_local(one))
    segments = unquote(place).split("/") if uri_scheme(place) in ("http", "https") else place.split("/")
    return not {".", ".."} & set(segments) and any(is_below(place, one) for one in prefixes if not is_local(one))


def suggest_scheme(scheme: str, known: Sequence[str] = ()) -> str:
    """Return `; did you mean s3://?` for a misspelt scheme; an empty text for a known one, or if none is similar."""
    names = [*CLOUD_SCHEMES, "https", "http", "file", *known]
    # Half of two letters: `s4` is `s3`.
    found = [] if scheme in names else difflib.get_close_matches(scheme, names, n=1, cutoff=0.5)
    return f"; did you mean {found[0]}://?" if found else ""


def suggest_bucket_uri(url: str) -> str:
    """Return `; did you mean s3://…?` for the web address of an object in a bucket, else an empty text."""
    for pattern, replacement in _BUCKET_URLS:
        if match := re.match(rf"https?://{pattern}", url, re.IGNORECASE):
            return f"; did you mean {match.expand(replacement)}?"
    return ""


def is_below(uri: str, prefix: str) -> bool:
    """Return True if a URI is equal to a prefix or below it, whatever the spelling of scheme, host and account.

    A prefix ends at a segment: `s3a://lake/in` holds `s3://lake/in` and `s3://lake/in/a.jpg`, but not `s3://lake/in2`.
    Of Azure, the same container without an account is any account's.
    """
    one, other = _take_apart(uri), _parse_prefix(prefix)
    if one.scheme != other.scheme or (one.account and other.account and one.account != other.account):
        return False
    folder = other.path
    return one.path.startswith(folder) and (
        not folder or folder.endswith("/") or one.path[len(folder) : len(folder) + 1] in ("", "/")
    )


@dataclass(frozen=True)
class _UriParts:
    """Parts of a URI in the one spelling in which they are compared.

    Attributes:
        scheme: Provider of a bucket, `file` for a local path, else the scheme in lower case.
        account: Storage account, if the URI names one; empty otherwise.
        path: Bucket and key, host and path, or local path.
    """

    scheme: str
    account: str
    path: str


def _take_apart(uri: str) -> _UriParts:
    if is_local(uri):
        path = str(local_path(uri)) if _is_file_uri(uri) and not explain_bad_file_uri(uri) else uri
        return _UriParts("file", "", path)
    match = _SCHEME.match(uri)
    assert match is not None
    scheme, (host, slash, key) = match[1].lower(), uri[match.end() :].partition("/")
    provider = CLOUD_SCHEMES.get(scheme, scheme)
    account = ""
    if provider == "az":
        host, _, account_host = host.partition("@")
        account = account_host.partition(".")[0]
    elif provider == scheme and scheme in ("http", "https"):
        host = host.lower()
    return _UriParts(provider, account, host + slash + key)


_parse_prefix = lru_cache(maxsize=256)(_take_apart)


@lru_cache(maxsize=256)
def _resolve_prefix(prefix: str) -> str:
    """Return the real path of a local prefix; kept, because each image of a run is compared with it."""
    return os.path.realpath(local_path(prefix))


def _is_file_uri(uri: str) -> bool:
    return _FILE.match(uri) is not None


def _split_file_uri(uri: str) -> tuple[str, str]:
    """Return host and path of a `file:` URI, the path as it is spelled."""
    rest = uri[len("file:") :]
    if not rest.startswith("//"):
        return "", rest
    host, slash, path = rest[2:].partition("/")
    return host, slash + path
