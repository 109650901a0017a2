"""Signals become requests, once."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from cache_service.interrupts import StoppedWaitingError, pause, stop_on_signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request(number):
    with stop_on_signal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested


def test_the_second_signal_acts_as_ever():
    with stop_on_signal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_two_runs_do_not_share_a_request():
    with stop_on_signal() as first:
        os.kill(os.getpid(), signal.SIGINT)
    with stop_on_signal() as second:
        assert first.requested
        assert not second.requested


def test_handlers_are_put_back_also_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), stop_on_signal():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_installs_nothing():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with stop_on_signal() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_a_signal_ends_a_pause_in_whichever_thread_at_once():
    ended = []

    def wait():
        with pytest.raises(StoppedWaitingError):
            pause(60)
        ended.append(time.monotonic())

    with stop_on_signal():
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.2)
        began = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)
        thread.join()
    assert ended[0] - began < 1
    pause(0.01)  # a request that was served does not end the waits of a later run
