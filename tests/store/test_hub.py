"""A hub that does not answer, in every way in which servers do not: seconds, and for one job only."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from huggingface_hub import constants

from spikellm.store.hub import answers, cache_if_silent, needs_hub
from tests.configure import configure

PATIENCE_S = 0.3


@contextmanager
def server(*sent: bytes, pause_s: float = 0.0) -> Iterator[str]:
    """The address of a server that accepts everybody and sends `sent` piece by piece, then nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        closed = threading.Event()

        def serve() -> None:
            while not closed.is_set():
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    for piece in sent:
                        closed.wait(pause_s)
                        connection.sendall(piece)
                    closed.wait(2)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        closed.set()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(("status", "answer"), [("200 OK", True), ("401 Unauthorized", True), ("404 No", True), ("503 Later", False)])
def test_a_refusal_is_an_answer_and_a_broken_server_is_none(status, answer):
    with server(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode()) as url:
        assert answers(url, 5.0) == answer


def test_silence_costs_no_more_than_the_patience():
    """Nobody listens, one that accepts and says nothing, one that never comes to an end, one without TLS, a name that nobody has."""
    with server() as mute, server(b"HTTP/1.1 200 OK\r\nA: b\r\n", *[b"x"] * 50, pause_s=0.1) as dripping:
        for url in ("http://127.0.0.1:9", mute, dripping, mute.replace("http", "https"), "http://no.such.host.invalid", "no url"):
            start = time.perf_counter()
            assert not answers(url, PATIENCE_S), url
            assert time.perf_counter() - start < PATIENCE_S + 0.5, url


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        ([], False),
        (["model=llama3_8b"], True),
        (["model=llama3_8b", "model.path=/"], False),
        (["dataset=wikitext2"], True),
        (["texts=[c4]"], True),
        (["dataset.zero_shot.tasks=[piqa]"], True),
        (["dataset.zero_shot.tasks=[piqa]", "dataset.zero_shot.path=F"], False),
    ],
)
def test_a_job_knows_whether_it_needs_the_hub(arguments, needed):
    assert needs_hub(configure(*arguments)) == needed


def test_a_silent_hub_is_asked_once_and_only_this_job_is_offline(monkeypatch, caplog):
    import datasets

    config = configure("model=llama3_8b", "dataset=wikitext2")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with server() as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        with suppress(ZeroDivisionError), cache_if_silent(config, PATIENCE_S):
            within = (constants.is_offline_mode(), datasets.config.HF_HUB_OFFLINE)
            raise ZeroDivisionError
    assert within == (True, True)
    assert caplog.text.count("does not answer") == 1
    assert not constants.is_offline_mode()
    assert not datasets.config.HF_HUB_OFFLINE
    with server(b"HTTP/1.1 200 OK\r\n\r\n") as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        with cache_if_silent(config, 5.0):
            assert not constants.is_offline_mode()
