"""Addresses, keys and proxies: mistakes are found before the first request, and no secret is ever shown."""

from __future__ import annotations

import base64
import logging
import traceback
from pathlib import Path
from typing import Any

import pytest

from popi.backends.base import ChatRequest
from popi.backends.openai import OpenAIBackend
from popi.backends.remote.server import read_server
from popi.backends.wrappers import Cache, Retry
from popi.cli import main
from popi.errors import BackendError, ConfigError
from popi.prompts import Message
from popi.testing import free_port
from tests.faults import Scripted, Serve, piece

SECRET = "sk-Very-Secret-0123456789"
KEY = "POPI_TEST_API_KEY"


def ask() -> ChatRequest:
    return ChatRequest([Message("user", "Why?")], max_tokens=9)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv(KEY, SECRET)


KEYS = {
    f"{SECRET}\r": "ends with a line break",
    f"{SECRET}\n": "ends with a line break",
    f"{SECRET}\r\n": "ends with a line break",
    f"{SECRET[:9]}\n{SECRET[9:]}": "contains white space",
    f" {SECRET}": "contains white space",
    f"{SECRET[:9]} {SECRET[9:]}": "contains white space",
    SECRET.replace("-", "\u2011"): "contains a character that is not ASCII",
    f"{SECRET}\u200b": "contains a character that is not ASCII",
    f"{SECRET}\udcff": "contains a character that is not ASCII",
    f"{SECRET}\x07": "contains a control character",
}


@pytest.mark.parametrize("key", KEYS, ids=ascii)
def test_a_key_that_no_header_can_hold_is_an_error_that_names_the_variable(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(KEY, key)
    file = tmp_path / "api.yaml"
    file.write_text(f"{{backend: openai, model: m, options: {{key: {KEY}, base_url: 'http://127.0.0.1:9/v1'}}}}")
    assert main(["generate", "--model", str(file), "--prompt", "Why?"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and f"field options.key: the key in the environment variable {KEY}" in printed
    assert KEYS[key] in printed and SECRET[:9] not in printed and SECRET[9:] not in printed


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_key_the_variable_is_named(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY) if value is None else monkeypatch.setenv(KEY, value)
    with pytest.raises(ConfigError, match=f"field key: the environment variable {KEY} is not set; export {KEY}"):
        OpenAIBackend("m", key=KEY)


@pytest.mark.parametrize("key", ["sk-proj-secret", "0123secret", "secretOfMine", "SECRET KEY", "secret\n"])
def test_a_key_in_place_of_its_name_is_not_repeated(key: str) -> None:
    with pytest.raises(ConfigError, match="field key: this environment variable is not set") as caught:
        OpenAIBackend("m", key=key)
    assert "secret" not in str(caught.value).lower()


URLS = {
    "http://127.0.0.1:9/v1\n": "contains white space",
    "http://127.0.0.1:9\r/v1": "contains white space",
    " http://127.0.0.1:9/v1": "contains white space",
    "http://a b/v1": "contains white space",
    "http://127.0.0.1:99999/v1": "has an invalid port",
    "http://127.0.0.1:port/v1": "has an invalid port",
    "127.0.0.1:9/v1": "does not start with http:// or https://",
    "localhost/v1": "does not start with http:// or https://",
    "ftp://127.0.0.1/v1": "does not start with http:// or https://",
    "": "does not start with http:// or https://",
    "http:///v1": "has no valid host name",
    "http://a..b/v1": "has no valid host name",
    f"http://{'a' * 99}/v1": "has no valid host name",
    "http://[::1/v1": "is not a valid URL",
    f"http://127.0.0.1:9/v1?key={SECRET}": "contains a query or a fragment",
    f"http://user:{SECRET}@127.0.0.1:port/v1": "has an invalid port",
    f"user:{SECRET}@127.0.0.1/v1": "does not start with http:// or https://",
}


PLACES = [("base_url", url) for url in URLS] + [("OPENAI_BASE_URL", url) for url in URLS if url]


@pytest.mark.parametrize(("place", "url"), PLACES, ids=ascii)
def test_an_address_that_is_none_is_an_error(place: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if place == "OPENAI_BASE_URL":
        monkeypatch.setenv(place, url)
    with pytest.raises(ConfigError) as caught:
        OpenAIBackend("m", key=None, base_url=url if place == "base_url" else None)
    assert place in str(caught.value) and URLS[url] in str(caught.value)
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.setenv(name, "")
    assert read_server(None, KEY, {}).url == "https://api.openai.com/v1"
    OpenAIBackend("m", key=KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1/")
    assert read_server(None, None, {}).url == "http://127.0.0.1:9/v1"
    assert read_server("HTTP://Local.Example/v1", None, {}).url == "http://local.example/v1"


PROXIES = {
    "socks5://127.0.0.1:1080": "is a SOCKS proxy, and socksio is not installed; pip install socksio",
    "socks5h://127.0.0.1:1080": "is a SOCKS proxy",
    "socks4://127.0.0.1:1080": "is not an HTTP or SOCKS5 proxy",
    "ftp://127.0.0.1": "is not an HTTP or SOCKS5 proxy",
    f"http://user:{SECRET}@127.0.0.1:port": "is not a valid URL",
    "http://127.0.0.1:99999": "is not a valid URL",
    "http://127.0.0.1:80\n": "is not a valid URL",
    "http://": "has no valid host name",
    "a..b:80": "has no valid host name",
}


@pytest.mark.parametrize("proxy", PROXIES, ids=ascii)
@pytest.mark.parametrize("name", ["ALL_PROXY", "https_proxy"])
def test_a_proxy_that_cannot_be_used_is_an_error_that_names_the_variable(
    proxy: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("popi.backends.remote.server.find_spec", lambda name: None)
    monkeypatch.setenv(name, proxy)
    with pytest.raises(ConfigError) as caught:
        OpenAIBackend("m", key=KEY)
    assert f"the proxy in the environment variable {name} {PROXIES[proxy]}" in str(caught.value)
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)
    # Requests to this server do not pass it.
    monkeypatch.setenv("NO_PROXY", "api.openai.com")
    OpenAIBackend("m", key=KEY)


async def test_a_request_passes_a_proxy_of_the_environment(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = serve(Scripted([piece("fine", "stop")]))
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1").replace("//", f"//user:{SECRET}@"))
    async with OpenAIBackend("m", base_url="http://popi.example/v1", key=None) as served:
        assert (await served.chat([ask()]))[0].text == "fine"
    assert "Proxy-Authorization" in proxy.headers[0]


def test_certificates_that_cannot_be_read_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "absent.pem"))
    with pytest.raises(ConfigError, match=r"the certificates in .*absent.pem cannot be read .*set SSL_CERT_FILE"):
        OpenAIBackend("m", key=KEY)


async def test_a_user_name_and_a_password_may_be_part_of_the_address(serve: Serve) -> None:
    server = serve(Scripted([piece("fine", "stop")]))
    url = server.url.replace("//", f"//ann%40home:{SECRET}@")
    async with OpenAIBackend("m", base_url=url, key=None) as served:
        assert (await served.chat([ask()]))[0].text == "fine"
        assert SECRET not in served.identity and "ann" not in served.identity
    expected = base64.b64encode(f"ann@home:{SECRET}".encode()).decode()
    assert server.headers[0]["Authorization"] == f"Basic {expected}"
    with pytest.raises(ConfigError, match="field key: base_url contains a user name and password, and a key is given"):
        OpenAIBackend("m", base_url=url, key=KEY)


async def test_headers_of_the_environment_are_sent_and_are_secrets(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(body: dict[str, Any]) -> Scripted:
        return Scripted({"error": {"message": f"gate: {server.headers[-1]['X-Gate']}"}}, status=400)

    server = serve(script)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"X-Gate: {SECRET}\nAuthorization: Bearer other")
    async with OpenAIBackend("m", base_url=server.url, key=None) as served:
        assert (await served.chat([ask()]))[0].error == "HTTP 400: gate: [hidden]"
    assert "Authorization" not in server.headers[-1]


@pytest.mark.parametrize("character", ["\x07", "\r", "\u2011"], ids=ascii)
def test_a_header_that_cannot_be_sent_is_an_error(character: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"A: b\nX-Gate: {SECRET}{character}{SECRET}")
    with pytest.raises(ConfigError, match="a header in the environment variable OPENAI_CUSTOM_HEADERS") as caught:
        OpenAIBackend("m", key=None)
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)


OPTIONS: dict[str, dict[str, Any]] = {
    "key": {"key": KEY},
    "user": {"key": None, "user": f"ann:{SECRET}"},
    "token in place of a user": {"key": None, "user": SECRET},
    "extra": {"key": None, "extra": {"proxy": {"headers": [SECRET]}}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("status", [200, 400, 401, 500])
async def test_no_secret_that_a_server_echoes_is_shown(
    serve: Serve, options: dict[str, Any], status: int, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def script(body: dict[str, Any]) -> Scripted:
        sent = server.headers[-1].get("Authorization", "")
        plain = base64.b64decode(sent.removeprefix("Basic ")).decode() if sent.startswith("Basic ") else ""
        return Scripted({"error": {"message": f"you sent {sent} {plain} and {body}, {SECRET}"}}, status=status)

    caplog.set_level(logging.DEBUG)
    server = serve(script)
    options = dict(options)
    user = options.pop("user", None)
    url = server.url.replace("//", f"//{user}@") if user else server.url
    bare = OpenAIBackend("m", base_url=url, **options)
    shown = [repr(bare), repr(vars(bare)["_server"]), bare.identity]
    async with Cache(Retry(bare, attempts=2, first=0.001), tmp_path / "cache.sqlite") as served:
        try:
            [result] = await served.chat([ask()])
            shown.append(repr(result))
        except BackendError as error:
            shown += traceback.format_exception(error)
        with pytest.raises(BackendError) as caught:
            await anext(served.stream(ask()))
        shown += traceback.format_exception(caught.value)
    shown += [record.getMessage() for record in caplog.records]
    shown += [file.read_bytes().decode("latin-1") for file in tmp_path.iterdir()]
    encoded = base64.b64encode(f"ann:{SECRET}".encode()).decode()
    assert any("you sent" in text for text in shown) and any("[hidden]" in text for text in shown)
    assert not any(secret in text for text in shown for secret in (SECRET, encoded))


async def test_a_secret_in_a_body_that_is_not_json_is_hidden(serve: Serve) -> None:
    for status in (200, 500):
        server = serve(Scripted(f"Authorization: Bearer {SECRET}".encode(), status=status))
        async with OpenAIBackend("m", base_url=server.url, key=KEY) as served:
            [result] = await served.chat([ask()])
        assert "Authorization: Bearer [hidden]" in str(result.error)


LOCATIONS = "ftp://127.0.0.1/", "http://a..b/", "http://127.0.0.1:99999/", "/v1/chat/completions"


@pytest.mark.parametrize("location", LOCATIONS)
async def test_a_request_that_cannot_be_sent_is_not_repeated(serve: Serve, location: str) -> None:
    server = serve(Scripted(b"", status=307, headers={"Location": location}))
    async with Retry(OpenAIBackend("m", base_url=server.url, key=None), first=0.001) as served:
        try:
            [result] = await served.chat([ask()])
            failure = result.failure
        except BackendError as error:
            failure = error.failure
            assert "\n" not in str(error)
    assert failure in ("denied", "request")
    assert len(server.bodies) == (21 if location.startswith("/") else 1)


async def test_an_address_where_nobody_listens_is_named() -> None:
    port = free_port()
    async with OpenAIBackend("m", base_url=f"http://ann:{SECRET}@127.0.0.1:{port}/v1", key=None) as served:
        with pytest.raises(BackendError, match=f"m: connection to http://127.0.0.1:{port}/v1 failed: ") as caught:
            await served.chat([ask()])
    assert caught.value.failure == "unreachable" and SECRET not in "".join(traceback.format_exception(caught.value))


def test_two_addresses_of_one_model_are_two_models() -> None:
    def identity(url: str = "http://127.0.0.1:9/v1", **options: Any) -> str:
        return OpenAIBackend("m", base_url=url, key=None, **options).identity

    same = {identity(), identity("http://127.0.0.1:9/v1/"), identity("http://ann:x@127.0.0.1:9/v1")}
    same |= {identity(timeout=3.0, max_concurrency=2)}
    others = [
        identity("http://127.0.0.1:10/v1"),
        identity("https://127.0.0.1:9/v1"),
        identity(fields={"temperature": None}),
        identity(extra={"reasoning_effort": "low"}),
        identity(extra={"reasoning_effort": "high"}),
        identity(tokenizer="popi-mini-base"),
        identity(tokenizer="popi-mini-reader-phi"),
        identity(tokenizer="popi-mini-base", context_length=99),
    ]
    assert len(same) == 1 and len({*same, *others}) == 1 + len(others)
