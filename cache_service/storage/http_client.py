"""Questions to one server, asked again until they are answered, and no longer than agreed.

What may pass is tried again: a server that is restarted, a line that breaks, an answer damaged on
the way. What will not pass is refused at once: a wrong token, a wrong name, a damaged cache.
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
import weakref
from collections.abc import Callable, Container
from typing import Any, Generic, NamedTuple, TypeVar

from urllib3.connection import HTTPConnection

from cache_service.errors import (
    ConfigError,
    CorruptError,
    KdCacheError,
    NotACacheError,
    RowsNotBuiltError,
    StorageError,
)
from cache_service.storage.http_address import TOKEN_VARIABLE, parse_address, read_token
from cache_service.storage.http_exchange import (
    Answer,
    BadAnswerError,
    BrokenExchangeError,
    Question,
    exchange,
    open_connection,
)

T = TypeVar("T")

LOG = logging.getLogger(__name__)

SAY_AFTER_S = 10.0
"""After so long without an answer a person is told: a run that waits looks like one that hangs."""

MAX_RETRY_AFTER_S = 30.0
"""A server may ask for more; it is asked again all the same."""

NO_ROUTE = "not_found"
"""What the service answers where no cache can be: the address is wrong, not its cache missing."""

_BUSY = frozenset({408, 425, 429, 502, 503, 504})
_KINDS = {
    kind.code: kind
    for kind in KdCacheError.__subclasses__()
    if kind.__module__ == KdCacheError.__module__
}
_JITTER = random.SystemRandom()
"""Not the global generator, which belongs to the run."""


class Patience(NamedTuple):
    """How failures are borne.

    Attributes:
        first_s: until the first answer of all: a wrong address should not take minutes to say.
        total_s: later, for one question: a server that is restarted, a machine that reboots.
        attempts: for answers that come but are damaged or make no sense.
        base_s: the first pause; each further one is twice as long.
        cap_s: the longest pause.
    """

    first_s: float = 10.0
    total_s: float = 300.0
    attempts: int = 6
    base_s: float = 0.1
    cap_s: float = 2.0


PATIENCE = Patience()


class _Setback(NamedTuple):
    """A try that may go better next time.

    Attributes:
        trouble: what to raise where there is no next time.
        pause_s: what the server asks to wait.
        kind: no answer; one that is bad; or a good one that says "not recorded yet".
    """

    trouble: KdCacheError
    kind: str
    pause_s: float = 0.0


class _Value(NamedTuple, Generic[T]):
    value: T


class HttpClient:
    """Asks one server. Safe to pickle and to fork: connections are opened where they are used."""

    def __init__(self, url: str, patience: Patience = PATIENCE) -> None:
        self.address = parse_address(url)
        self.url = self.address.url
        self.patience = patience
        self._answered = False
        self._open_here()

    def __getstate__(self) -> dict[str, Any]:
        """Without connections. The token is read for each question and never kept."""
        return {"url": self.url, "patience": self.patience, "answered": self._answered}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.url = state["url"]
        self.address = parse_address(self.url)
        self.patience = state["patience"]
        self._answered = state["answered"]
        self._open_here()

    def ask(
        self,
        question: Question,
        read: Callable[[Answer], T],
        *,
        passes: Container[int] = (),
        wait_s: float = 0.0,
    ) -> T:
        """The answer, as `read` understands it.

        Args:
            question: what is asked.
            read: makes a value of a good answer; raises CorruptError where it is not what was
                asked for, and then the server is asked again.
            passes: statuses of errors that are for `read`, too.
            wait_s: how long rows are awaited that are planned but not recorded.

        Raises:
            StorageError: no answer in time, or none that makes sense.
            CorruptError: every answer was damaged, or the server says that the cache is.
            RowsNotBuiltError: not recorded, or not within `wait_s`.
            ConfigError: the server wants another token.
            KdCacheError: any other refusal that the server states.
        """
        began = quiet_since = time.monotonic()
        tries = bad = 0
        said = False
        while True:
            got = self._try(question, read, passes)
            if not isinstance(got, _Setback):
                return got.value
            now = time.monotonic()
            pause = max(got.pause_s, self._backoff(tries))
            if got.kind == "waiting":
                # An outage in between is borne anew: waiting does not use up that patience.
                quiet_since, tries, ends, said = now, 0, began + wait_s, False
                pause = min(pause, max(ends - now, 0.0))
                given_up = now >= ends
            else:
                tries += 1
                bad += got.kind == "bad"
                ends = quiet_since + self._borne_s()
                given_up = bad >= self.patience.attempts or now + pause > ends
                if not said and not given_up and now + pause - quiet_since >= SAY_AFTER_S:
                    LOG.warning("%s Trying for %.0f s more.", got.trouble.message, ends - now)
                    said = True
            if given_up:
                raise got.trouble
            time.sleep(pause)

    def _try(
        self, question: Question, read: Callable[[Answer], T], passes: Container[int]
    ) -> _Value[T] | _Setback:
        try:
            answer = self._exchange(question)
        except BadAnswerError as problem:
            return _Setback(CorruptError(f"{self._what(question)} got {problem}."), "bad")
        except BrokenExchangeError as problem:
            hint = f"Check the address, and that `kd-cache serve` runs on {self.address.host}."
            trouble = StorageError(f"{self._what(question)} got no answer: {problem}.", hint=hint)
            return _Setback(trouble, "silent")
        self._answered = True
        told = _problem_of(answer)
        elsewhere = told.get("code") in (NotACacheError.code, NO_ROUTE)
        known = answer.status in passes and not elsewhere
        if 200 <= answer.status < 300 or (known and (told or answer.status != 404)):
            try:
                return _Value(read(answer))
            except CorruptError as damage:
                return _Setback(damage, "bad")
        return self._judge(question, answer, told)

    def _judge(self, question: Question, answer: Answer, told: dict[str, Any]) -> _Setback:
        refusal = self._refusal(question, answer, told)
        if isinstance(refusal, RowsNotBuiltError) and answer.status == 503:
            return _Setback(refusal, "waiting", _retry_after(answer))
        if answer.status in _BUSY:
            return _Setback(refusal, "silent", _retry_after(answer))
        moved = 300 <= answer.status < 400
        # A status may itself be damage on the way, unless the document in the body repeats it.
        if moved or (told and (answer.status < 500 or told["code"] == CorruptError.code)):
            raise refusal
        return _Setback(refusal, "bad")

    def _refusal(self, question: Question, answer: Answer, told: dict[str, Any]) -> KdCacheError:
        what, status = self._what(question), answer.status
        if status in (401, 403):
            return self._unwelcome(status)
        if 300 <= status < 400:
            return StorageError(
                f"{what} is redirected ({status}) to {_clean(answer.headers.get('location'))}: "
                "redirects are not followed, because the token would go with them.",
                hint="Use the final address.",
            )
        if told and told["code"] != NO_ROUTE:
            kind = _KINDS.get(told["code"], StorageError)
            detail = _clean(told.get("detail")) or f"status {status}"
            return kind(f"{self.url} says: {detail}", hint=_clean(told.get("hint")))
        if status == 404:
            return NotACacheError(
                f"no cache at {self.url}: the server there answers 404.",
                hint="Write http(s)://HOST[:PORT]/v1/caches/NAME; HOST/v1/caches lists the names.",
            )
        return StorageError(f"{what} is answered with status {status}.")

    def _unwelcome(self, status: int) -> ConfigError:
        if read_token() is None:
            found, hint = "asks for a token, and none is set here", "Put one that it knows into"
        elif status == 401:
            found, hint = "does not know the token that it was sent", "Put one that it knows into"
        else:
            found, hint = "does not let this token do this", "Put one with the right scope into"
        return ConfigError(
            f"{self.url} {found} ({status}).", hint=f"{hint} the environment as {TOKEN_VARIABLE}."
        )

    def _exchange(self, question: Question) -> Answer:
        token = read_token()
        headers = {
            "Accept-Encoding": "identity",
            "User-Agent": "kd-cache",
            **question.headers,
        }
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        connection = self._take()
        answer = exchange(connection, question, self.address.path + question.target, headers)
        self._idle.append(connection)
        return answer

    def _take(self) -> HTTPConnection:
        if self._process != os.getpid():  # a fork: these sockets are the parent's
            self._open_here()
        try:
            return self._idle.pop()
        except IndexError:
            return open_connection(self.address)

    def _open_here(self) -> None:
        self._process = os.getpid()
        self._idle: list[HTTPConnection] = []
        weakref.finalize(self, _close_all, self._idle)

    def _what(self, question: Question) -> str:
        return f"{question.method} {self.url}{question.target}"

    def _borne_s(self) -> float:
        return self.patience.total_s if self._answered else self.patience.first_s

    def _backoff(self, tries: int) -> float:
        longest = min(self.patience.cap_s, self.patience.base_s * 2.0 ** min(tries, 30))
        return longest * _JITTER.uniform(0.5, 1.0)


def _close_all(connections: list[HTTPConnection]) -> None:
    while connections:
        connections.pop().close()


def _problem_of(answer: Answer) -> dict[str, Any]:
    """The problem document of an error; empty where there is none of this very status."""
    kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    if answer.status < 400 or kind != "application/problem+json":
        return {}
    try:
        told = json.loads(answer.body)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(told, dict) or told.get("status") != answer.status:
        return {}
    return told | {"code": str(told.get("code"))}


def _retry_after(answer: Answer) -> float:
    text = answer.headers.get("retry-after", "")
    return min(float(text), MAX_RETRY_AFTER_S) if text.isascii() and text.isdigit() else 0.0


def _clean(text: Any) -> str:
    """A server's words, fit for one line of ours: no control characters, no token, not long."""
    if not isinstance(text, str):
        return ""
    token = read_token()
    shown = text[:2000].replace(token, "***") if token else text[:2000]
    return "".join(c if c.isprintable() else " " for c in shown)[:500]
