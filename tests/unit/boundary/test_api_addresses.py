"""Result files come from the internet: no URL leads a worker into its own networks."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from airflow_provider_siliconflow.api import protocol
from airflow_provider_siliconflow.api.addresses import is_private_name, is_public
from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import (
    IncompleteResultsError,
    ServiceUnavailableError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.api.settings import ClientSettings
from tests.unit.boundary.hostile import KEY, Server, answer, make_settings, serving

pytestmark = pytest.mark.usefixtures("no_proxies")

#: What a resolver says, by name; other names as they are.
Names = dict[str, list[str]]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """A resolver of our own. A list of several addresses is given out one by one, as a rebinding server does."""
    known: Names = {"api.siliconflow.cn": ["8.8.8.8"]}
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if host in known:
            addresses = known[host]
            address = addresses.pop(0) if len(addresses) > 1 else addresses[0]
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            return [(family, socket.SOCK_STREAM, 6, "", (address, port or 0))]
        return real(host, port, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return known


@pytest.fixture
def storage() -> Iterator[Server]:
    with serving(answer(b"whole")) as server:
        yield server


PUBLIC = ClientSettings(KEY, max_retries=0, backoff=0.01)


def download(settings: ClientSettings, url: str) -> bytes:
    with SiliconFlowClient(settings) as client:
        return b"".join(client.iter_file(url, lambda: None))


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "0.0.0.0",
        "localhost",
        "LOCALHOST.",
        "sub.localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "[::]",
    ],
)
@pytest.mark.usefixtures("names")
def test_no_result_is_fetched_from_the_worker_itself(storage: Server, host: str) -> None:
    with pytest.raises(IncompleteResultsError, match="not a public address"):
        download(PUBLIC, f"http://{host}:{storage.port}/out?sig=SECRET")
    assert storage.requests == []


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "10.0.0.1", "169.254.169.254"])
def test_a_name_that_resolves_into_a_private_network_is_refused(
    storage: Server, names: Names, address: str
) -> None:
    names["storage.example"] = [address]
    with pytest.raises(IncompleteResultsError, match="not a public address"):
        download(PUBLIC, f"http://storage.example:{storage.port}/out")
    assert storage.requests == []


def test_a_name_that_changes_its_address_under_the_check_is_refused(storage: Server, names: Names) -> None:
    """What is checked is what is connected to, whatever the resolver says the next time."""
    names["storage.example"] = ["8.8.8.8", "127.0.0.1"]
    connected: list[Any] = []

    def connect(address: Any, *_: Any, **__: Any) -> Any:
        connected.append(address)
        raise OSError("refused")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("airflow_provider_siliconflow.api.connections.create_connection", connect)
        with pytest.raises(SiliconFlowError):
            download(PUBLIC, f"http://storage.example:{storage.port}/out")
    assert connected == [("8.8.8.8", storage.port)]
    assert storage.requests == []


def test_a_redirect_into_a_private_network_is_refused(names: Names, storage: Server) -> None:
    # The first storage stands for one on the internet.
    with serving(answer(b"", 302, Location=f"{storage.url}/out")) as first:
        names["storage.example"] = ["8.8.8.8"]
        real = socket.create_connection

        def connect(address: Any, *args: Any, **options: Any) -> Any:
            return real(("127.0.0.1", first.port), timeout=5)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("airflow_provider_siliconflow.api.connections.create_connection", connect)
            with pytest.raises(IncompleteResultsError, match="not a public address"):
                download(PUBLIC, f"http://storage.example:{first.port}/out")
        assert len(first.requests) == 1
    assert storage.requests == []


def test_storage_beside_an_api_that_is_not_on_the_internet_either(names: Names, storage: Server) -> None:
    for base in ("http://127.0.0.1:9", "http://emulator:9"):
        names["emulator"] = ["172.17.0.2"]
        assert download(make_settings(base), f"{storage.url}/out") == b"whole"


def test_behind_a_proxy_the_name_is_judged_and_the_proxy_resolves(names: Names) -> None:
    with serving(answer(b"whole")) as proxy:
        settings = ClientSettings(KEY, proxies={"all": proxy.url}, max_retries=0)
        for host in ("127.0.0.1", "2130706433", "localhost", "[::1]", "169.254.169.254"):
            with pytest.raises(IncompleteResultsError):
                download(settings, f"http://{host}/out")
        assert proxy.requests == []
        names["storage.example"] = ["10.0.0.1"]
        assert download(settings, "http://storage.example/out") == b"whole"


def test_a_message_says_what_to_do_and_shows_no_signature(storage: Server, names: Names) -> None:
    names["storage.example"] = ["10.0.0.1"]
    with pytest.raises(IncompleteResultsError) as caught:
        download(PUBLIC, f"http://storage.example:{storage.port}/out?sig=SECRET")
    assert "proxies" in str(caught.value)
    assert "SECRET" not in str(caught.value)
    assert caught.value.retryable


# Redirects --------------------------------------------------------------------------------------------------


def test_redirects_end() -> None:
    with serving(b"") as server:
        server.serve = lambda connection, request: connection.sendall(answer(b"", 302, Location="/again"))
        with pytest.raises(ServiceUnavailableError, match="redirects"):
            download(make_settings(server.url), f"{server.url}/out")
    assert len(server.requests) == 6


@pytest.mark.parametrize("target", ["http://storage.example/x", "HTTP://storage.example/x"])
def test_no_redirect_leaves_https(target: str) -> None:
    with pytest.raises(IncompleteResultsError, match="https to http"):
        protocol.redirect_target("https://storage.example/out", target)
    assert (
        protocol.redirect_target("http://storage.example/out", "https://a.example/x") == "https://a.example/x"
    )


# Size -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [True, False])
def test_a_file_beyond_its_limit_is_not_read(announced: bool) -> None:
    head = answer(b"", Content_Length=str(1 << 40)) if announced else b"HTTP/1.1 200 OK\r\n\r\n"
    with serving(b"") as server:
        server.serve = lambda connection, request: server.flood(
            connection, iter([head, *[b"x" * 65536] * 4000])
        )
        came: list[int] = []
        with (
            SiliconFlowClient(make_settings(server.url)) as client,
            pytest.raises(IncompleteResultsError, match="1000000 bytes"),
        ):
            came.extend(map(len, client.iter_file(f"{server.url}/out", lambda: None, limit=1_000_000)))
    assert sum(came) <= 1_000_000
    assert len(server.requests) == 1


def test_a_file_at_its_limit_is_read(storage: Server) -> None:
    with SiliconFlowClient(make_settings(storage.url)) as client:
        assert b"".join(client.iter_file(f"{storage.url}/out", lambda: None, limit=5)) == b"whole"


def test_a_file_that_comes_byte_by_byte_in_answers_without_end_is_given_up() -> None:
    def serve(connection: socket.socket, request: bytes) -> None:
        start = 0
        for line in request.split(b"\r\n"):
            if line.lower().startswith(b"range: bytes="):
                start = int(line[13:-1])
        connection.sendall(answer(b"x", 206, Content_Range=f"bytes {start}-{start}/*"))

    with serving(serve) as server:

        def first(connection: socket.socket, request: bytes) -> None:
            connection.sendall(answer(b"x", Content_Length="999999"))
            server.serve = serve

        server.serve = first
        with pytest.raises(IncompleteResultsError, match="no end"):
            download(make_settings(server.url, max_retries=2), f"{server.url}/out")
        assert len(server.requests) < 200


def test_a_download_that_drips_is_given_up() -> None:
    with serving(b"") as server:
        server.serve = lambda connection, request: server.drip(
            connection, answer(b"x" * 9999, Content_Length=str(1 << 30))
        )
        settings = make_settings(server.url, timeout=0.3, connect_timeout=0.2, max_retries=1)
        with pytest.raises(SiliconFlowError, match="slower than a transfer may be"):
            download(settings, f"{server.url}/out")
    assert len(server.requests) == 2


def test_a_consumer_may_take_its_time() -> None:
    """What is done with the pieces, such as writing them to a slow object store, is no fault of the storage."""
    body = b"x" * (1 << 20)
    with serving(answer(body)) as server:
        settings = make_settings(server.url, timeout=0.2, connect_timeout=0.1)
        came = 0
        with SiliconFlowClient(settings) as client:
            for piece in client.iter_file(f"{server.url}/out", lambda: None):
                came += len(piece)
                time.sleep(0.15)
    assert came == len(body)
    assert len(server.requests) == 1


# The names by themselves ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.100.100.200", False),
        ("169.254.169.254", False),
        ("127.8.8.8", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("198.18.0.1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("2002:a00:1::", False),
        ("64:ff9b:1::a00:1", False),
        ("::10.0.0.1", False),
        ("::ffff:0:169.254.169.254", False),
        ("::ffff:0:8.8.8.8", True),
        ("fec0::1", False),
        ("192.0.0.192", False),
        ("168.63.129.16", False),
        ("no address", False),
    ],
)
def test_which_addresses_are_on_the_internet(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize(
    ("host", "private"),
    [
        ("storage.example", False),
        ("8.8.8.8", False),
        ("134744072", False),
        ("a.1", False),
        ("", False),
        ("\ud800", False),
        ("0x7f.1", True),
        ("127.0.0.1.", True),
    ],
)
def test_which_names_are_private_by_themselves(host: str, private: bool) -> None:
    with contextlib.suppress(UnicodeError):
        assert is_private_name(host) is private
