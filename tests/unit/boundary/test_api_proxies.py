"""
Behind a proxy, "not sent" is only what certainly never left; everything else may be paid for.

The proxies are real, with TLS through a tunnel and with plain HTTP.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_siliconflow.api import protocol
from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import NoAnswerError, NotSentError
from tests.unit.boundary.hostile import (
    BATCH,
    Ask,
    Server,
    always,
    answer,
    certificate,
    creation,
    make_settings,
    reset,
    server_tls,
    serving,
)

pytestmark = pytest.mark.usefixtures("no_proxies")

#: What a proxy does with its connection and the bytes it reads of the origin's answer.
Meddle = Callable[[socket.socket, bytes], bytes]


class Proxy(Server):
    """
    Makes tunnels and passes plain requests on.

    :param refusal: status with which it refuses a tunnel.
    :param meddle: what it makes of the bytes that the origin sends.
    """

    def __init__(self, *, refusal: int | None = None, meddle: Meddle | None = None) -> None:
        super().__init__(self._pass_on)
        self._refusal, self._meddle = refusal, meddle or (lambda connection, data: data)
        #: Bytes that came back from the origin.
        self.came = b""

    def _pass_on(self, client: socket.socket, request: bytes) -> None:
        method, target, _ = request.split(b" ", 2)
        if self._refusal:
            client.sendall(answer(b"no", self._refusal))
            return
        place = target if method == b"CONNECT" else target.split(b"/")[2]
        host, _, port = place.decode().rpartition(":")
        with socket.create_connection((host, int(port))) as origin:
            if method == b"CONNECT":
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                threading.Thread(target=self._copy, args=(client, origin), daemon=True).start()
            else:
                origin.sendall(request)
            while data := origin.recv(65536):
                self.came += data
                client.sendall(self._meddle(client, data))

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(params=["http", "https"])
def origin(request: pytest.FixtureRequest, pem: Path) -> Iterator[Server]:
    with serving(answer(BATCH), server_tls(pem) if request.param == "https" else None) as server:
        yield server


@contextlib.contextmanager
def proxied(origin: Server, pem: Path, **behaviour: Any) -> Iterator[tuple[Proxy, Any]]:
    proxy = Proxy(**behaviour)
    scheme = origin.url.partition(":")[0]
    settings = make_settings(origin.url, proxies={scheme: proxy.url}, verify=str(pem), timeout=2.0)
    try:
        yield proxy, settings
    finally:
        proxy.close()


def test_an_honest_proxy_is_no_hindrance(ask: Ask, origin: Server, pem: Path) -> None:
    with proxied(origin, pem) as (proxy, settings):
        assert ask(settings, creation()).id == "batch_1"
        assert len(proxy.requests) == 1


@pytest.mark.parametrize("how", ["reset", "closed", "silent"])
def test_an_answer_that_is_lost_behind_a_proxy_may_be_paid_for(
    ask: Ask, origin: Server, pem: Path, how: str
) -> None:
    def meddle(connection: socket.socket, data: bytes) -> bytes:
        if not origin.requests:
            # The handshake of TLS.
            return data
        if how == "reset":
            reset(connection)
        elif how == "closed":
            connection.shutdown(socket.SHUT_RDWR)
        return b""

    with proxied(origin, pem, meddle=meddle) as (_, settings), pytest.raises(NoAnswerError) as caught:
        ask(settings, creation())
    assert protocol.leaves_effect_open(caught.value)
    assert len(origin.requests) == 1


def test_a_lost_answer_is_not_followed_by_another_send(ask: Ask, origin: Server, pem: Path) -> None:
    def meddle(connection: socket.socket, data: bytes) -> bytes:
        if origin.requests:
            reset(connection)
        return data

    with proxied(origin, pem, meddle=meddle) as (_, settings), pytest.raises(NoAnswerError):
        ask(replace(settings, max_retries=5), creation())
    assert len(origin.requests) == 1


@pytest.mark.parametrize("status", [403, 407, 502, 503])
def test_a_tunnel_that_is_refused_was_not_gone_through(ask: Ask, pem: Path, status: int) -> None:
    with (
        serving(answer(BATCH), server_tls(pem)) as origin,
        proxied(origin, pem, refusal=status) as (_, settings),
    ):
        with pytest.raises(NotSentError, match=str(status)):
            ask(settings, creation())
        assert origin.requests == []


def test_a_proxy_that_is_lost_before_the_tunnel_stands_has_passed_nothing_on(ask: Ask, pem: Path) -> None:
    with (
        serving(answer(BATCH), server_tls(pem)) as origin,
        serving(lambda connection, request: reset(connection)) as proxy,
    ):
        settings = make_settings(origin.url, proxies={"https": proxy.url}, verify=str(pem))
        with pytest.raises(NotSentError):
            ask(settings, creation())
        assert len(proxy.requests) == 1
        assert origin.requests == []


def test_a_proxy_that_cannot_be_reached_has_passed_nothing_on(ask: Ask, origin: Server, pem: Path) -> None:
    with contextlib.closing(socket.socket()) as held:
        held.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{held.getsockname()[1]}"
        scheme = origin.url.partition(":")[0]
        with pytest.raises(NotSentError):
            ask(make_settings(origin.url, proxies={scheme: dead}, verify=str(pem)), creation())
    assert origin.requests == []


def test_a_certificate_that_is_refused_behind_a_proxy(ask: Ask, pem: Path) -> None:
    with serving(answer(BATCH), server_tls(pem)) as origin:
        proxy = Proxy()
        settings = make_settings(origin.url, proxies={"https": proxy.url})
        with pytest.raises(NotSentError, match=r"(?i)certificate"):
            ask(settings, creation())
        proxy.close()
        assert origin.requests == []


def test_a_plain_proxys_own_answer_is_an_answer(ask: Ask) -> None:
    """A gateway that cannot reach the service says so, and one that lost its answer says the same."""
    with serving(answer(b"<html>Bad gateway, overloaded</html>", 502)) as proxy:
        settings = make_settings("http://api.invalid", proxies={"http": proxy.url})
        with pytest.raises(Exception, match="502") as caught:
            ask(settings, creation())
        assert protocol.leaves_effect_open(caught.value)


@pytest.mark.parametrize("body", [b"<html>Backend overloaded</html>", b"overloaded"])
def test_only_the_services_own_word_that_it_is_overloaded_is_a_refusal(ask: Ask, body: bytes) -> None:
    with serving(answer(body, 503)) as server, pytest.raises(Exception, match="503") as caught:
        ask(make_settings(server.url), creation())
    assert protocol.leaves_effect_open(caught.value)


# Without a proxy --------------------------------------------------------------------------------------------


def test_a_handshake_that_fails_has_sent_nothing(ask: Ask) -> None:
    with serving(always(b"this is not TLS")) as server, pytest.raises(NotSentError):
        ask(make_settings(server.url.replace("http:", "https:"), connect_timeout=0.5), creation())


def test_a_connection_that_is_reset_after_the_request_may_have_counted(
    ask: Ask, origin: Server, pem: Path
) -> None:
    origin.serve = lambda connection, request: reset(connection)
    with pytest.raises(NoAnswerError):
        ask(make_settings(origin.url, verify=str(pem)), creation())
    assert len(origin.requests) == 1


def test_a_request_that_a_signal_interrupts_is_judged_by_itself(origin: Server, pem: Path) -> None:
    """``on_kill`` may come while a batch is created, and use the same client."""
    with SiliconFlowClient(make_settings(origin.url, verify=str(pem))) as client:

        def lose(connection: socket.socket, request: bytes) -> None:
            if request.startswith(b"POST"):
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.3)
                reset(connection)
            else:
                connection.sendall(answer(BATCH))

        origin.serve = lose
        before = signal.signal(signal.SIGUSR1, lambda *_: client.get_batch("batch_1") and None)
        try:
            with pytest.raises(NoAnswerError):
                client.call(creation())
        finally:
            signal.signal(signal.SIGUSR1, before)
    assert [request[:4] for request in origin.requests] == [b"POST", b"GET "]
