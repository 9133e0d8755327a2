"""The address of a server and the authorization of requests, read from options and the environment, and checked.

Without the checks a mistake would raise an error of the HTTP library at the first request, and that error contains the
secret.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from popi.errors import ConfigError

OPENAI = "https://api.openai.com/v1"
URL_VARIABLE = "OPENAI_BASE_URL"
HEADERS_VARIABLE = "OPENAI_CUSTOM_HEADERS"
PROXIES = ("http", "https", "all")
HIDDEN = "[hidden]"

SHORTEST_SECRET, SHORTEST_VALUE = 4, 6
"""Minimum length of a key, and of a value of ``extra``, that is hidden in messages. Shorter ones are parts of words."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server.

    Attributes:
        url: Base URL of the API, without user name and password.
        authorization: The ``Authorization`` header; ``None`` for a server that needs none.
        secrets: Texts that no message may contain.
        proxied: Whether requests use the proxies of the environment.
    """

    url: str
    authorization: str | None = field(default=None, repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)
    proxied: bool = True

    @property
    def is_openai(self) -> bool:
        """Whether it is OpenAI's own."""
        return urlsplit(self.url).hostname == urlsplit(OPENAI).hostname

    def redact(self, text: str) -> str:
        """Hides all secrets in a text."""
        for secret in self.secrets:
            text = text.replace(secret, HIDDEN)
        return text


def read_server(base_url: str | None, key: str | None, extra: Mapping[str, Any]) -> Server:
    """Reads and checks the address, the key, the headers and the proxies.

    Args:
        base_url: Base URL of the API; ``None`` is ``OPENAI_BASE_URL``, or OpenAI's own.
        key: Name of the environment variable with the key; ``None`` for a server that needs none.
        extra: Additional request fields, whose values may be secrets.

    Raises:
        ConfigError: If one of them cannot be used. No message contains a secret.
    """
    parts, user = _read_url(base_url)
    secrets = [secret for proxy in _proxies().values() for secret in _secrets_of(_user_info(proxy))]
    authorization = None
    if key is not None:
        if user:
            raise ConfigError(
                "base_url contains a user name and password, and a key is given too",
                field="key",
                fix="set key: null, or remove them from base_url",
            )
        authorization = f"Bearer {(value := _read_key(key))}"
        secrets += [value, quote(value, safe="")]
    elif user:
        authorization = f"Basic {base64.b64encode(unquote(user).encode()).decode()}"
        secrets += [authorization.removeprefix("Basic "), *_secrets_of(user)]
    proxied = not proxy_bypass(parts.hostname or "")
    if proxied:
        _check_proxies()
    hidden = {secret for secret in secrets if len(secret) >= SHORTEST_SECRET} | {*_values([extra, *_read_headers()])}
    longest_first = tuple(sorted(hidden, key=len, reverse=True))
    return Server(urlunsplit(parts).rstrip("/"), authorization, longest_first, proxied)


def _read_url(base_url: str | None) -> tuple[SplitResult, str]:
    """Reads the base URL, and splits off user name and password."""
    from_environment = base_url is None and bool(os.environ.get(URL_VARIABLE))
    url = os.environ.get(URL_VARIABLE) or OPENAI if base_url is None else base_url
    if problem := _problem_of_url(url):
        where: dict[str, Any] = {} if from_environment else {"field": "base_url"}
        name = f"the environment variable {URL_VARIABLE}" if from_environment else "the base URL"
        raise ConfigError(f"{name} {problem}", **where, fix="write it as https://host:port/v1")
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    return parts._replace(scheme=parts.scheme.lower(), netloc=host.lower()), user


def _problem_of_url(url: str) -> str | None:
    if any(char.isspace() or not char.isprintable() for char in url):
        return "contains white space, a line break or a control character"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return "has an invalid port" if "port" in str(error).lower() else "is not a valid URL"
    if parts.scheme not in ("http", "https"):
        return "does not start with http:// or https://"
    if parts.query or parts.fragment:
        return "contains a query or a fragment"
    return None if _is_host(host) else "has no valid host name"


def _is_host(host: str | None) -> bool:
    try:
        return bool((host or "").encode("idna"))
    except UnicodeError:
        return False


def _read_key(name: str) -> str:
    value = os.environ.get(name)
    if not value and name.isidentifier() and name.isupper():
        raise ConfigError(
            f"the environment variable {name} is not set", field="key", fix=f"export {name}, or name another variable"
        )
    if not value:
        # The name may be the key itself, which must not be printed.
        raise ConfigError(
            "this environment variable is not set", field="key", fix="give the name of a variable, not the key itself"
        )
    if problem := _problem_of_key(value):
        raise ConfigError(
            f"the key in the environment variable {name} {problem}", field="key", fix=f"set {name} again, without it"
        )
    return value


def _problem_of_key(value: str) -> str | None:
    if value.rstrip("\r\n") != value:
        return "ends with a line break"
    if any(char.isspace() for char in value):
        return "contains white space"
    return _problem_of_header(value)


def _read_headers() -> Iterator[str]:
    """The values of the headers that the SDK adds to each request, which may be secrets."""
    for line in os.environ.get(HEADERS_VARIABLE, "").split("\n"):
        value = line.partition(":")[2].strip()
        if problem := _problem_of_header(value):
            raise ConfigError(
                f"a header in the environment variable {HEADERS_VARIABLE} {problem}",
                fix=f"set {HEADERS_VARIABLE} again, without it",
            )
        yield value


def _problem_of_header(value: str) -> str | None:
    if not value.isascii():
        return "contains a character that is not ASCII, such as a typographic dash"
    return None if value.isprintable() else "contains a control character"


def _proxies() -> dict[str, str]:
    """The proxies of the environment, by scheme."""
    return {scheme: url for scheme, url in getproxies().items() if scheme in PROXIES}


def _check_proxies() -> None:
    for scheme, url in _proxies().items():
        if problem := _problem_of_proxy(url):
            names = [f"{scheme}_proxy", f"{scheme}_proxy".upper()]
            name = next((name for name in names if os.environ.get(name)), names[1])
            raise ConfigError(f"the proxy in the environment variable {name} {problem[0]}", fix=problem[1])


def _problem_of_proxy(url: str) -> tuple[str, str] | None:
    """The problem of a proxy, and how to fix it."""
    rewrite = "write it as http://host:port, or unset it"
    url = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(url)
        if any(char.isspace() or not char.isprintable() for char in url) or parts.port == 0:
            return "is not a valid URL", rewrite
    except ValueError:
        return "is not a valid URL", rewrite
    if parts.scheme in ("socks5", "socks5h"):
        if find_spec("socksio") is None:
            return "is a SOCKS proxy, and socksio is not installed", "pip install socksio, or unset it"
    elif parts.scheme not in ("http", "https"):
        return "is not an HTTP or SOCKS5 proxy", rewrite
    return None if _is_host(parts.hostname) else ("has no valid host name", rewrite)


def _user_info(url: str) -> str:
    return url.rpartition("@")[0].rpartition("//")[2]


def _secrets_of(user: str) -> Iterator[str]:
    """The forms in which user name and password of a URL may appear in a message."""
    name, colon, password = user.partition(":")
    secret = password if colon else name
    for form in (user, secret):
        yield from (form, unquote(form))


def _values(value: Any) -> Iterator[str]:
    """All texts in a tree."""
    if isinstance(value, str):
        if len(value) >= SHORTEST_VALUE:
            yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _values(inner)
