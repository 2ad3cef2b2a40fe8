"""Requests to somebody's server by POST: a deadline for all of each, asked again only where nothing has begun."""

from __future__ import annotations

import email.utils
import ipaddress
import os
import queue
import socket
import threading
import time
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests
from requests.structures import CaseInsensitiveDict
from requests.utils import get_environ_proxies, select_proxy
from urllib3.exceptions import MaxRetryError, NewConnectionError

from rlhf.config.reward import ServerRewardConfig
from rlhf.rewards.failures import RAISED, REFUSED, TIMED_OUT
from rlhf.shell.ending import RunError
from transfer.agreement.shown import one_line, shown

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0  # between attempts to connect, doubled each time
BUSY = (429, 503)
NO_PROXY = {"http": "", "https": "", "all": ""}
MOST_BYTES = 64 * 2**20  # of an answer
CHUNK = 2**16  # bytes read at a time


class Answer(NamedTuple):
    """What the server has said."""

    status_code: int
    headers: CaseInsensitiveDict[str]
    body: bytes


class FailedError(Exception):
    """A request has no answer: by which class of `failures.py`, and why."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(why)
        self.what = what


class Post:
    """Asks the server of `reward.url`, in any number of threads.

    Again, `retries` times a request, only where the server has not begun: it refused the connection, or answered 429 or
    503 with Retry-After. A bearer token is sent if the environment variable `token_variable` has one.
    """

    def __init__(self, config: ServerRewardConfig) -> None:
        self.config = config
        self._token = _token(config.token_variable)
        self._here = _is_loopback(urlsplit(config.url).hostname or "")

    def __call__(self, body: bytes) -> Answer | FailedError:
        """The answer with status 200, or why there is none."""
        try:
            return self._response(body)
        except FailedError as error:
            return error

    def check(self) -> None:
        """RunError if nothing listens where the requests will go; waits for it as they do, and sends nothing."""
        parts = urlsplit(self.config.url)
        if not self._here and select_proxy(self.config.url, get_environ_proxies(self.config.url)):
            return  # what listens there is the proxy
        address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        wait_s = FIRST_WAIT_S
        for left in range(self.config.retries, -1, -1):
            try:
                socket.create_connection(address, self.config.timeout_s).close()
                return
            except ConnectionRefusedError:
                if left:
                    time.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
            except OSError as error:
                raise RunError(str(self.broken(REFUSED, f"cannot be reached: {error}"))) from None
        raise RunError(str(self._absent("refused the connection")))

    def _response(self, body: bytes) -> Answer:
        """The server's answer with status 200, asked for at most 1 + `retries` times."""
        wait_s = FIRST_WAIT_S
        for left in range(self.config.retries, -1, -1):
            response = self._within_deadline(body)
            if response is None:
                what, pause_s, wait_s = "refused the connection", wait_s, min(2 * wait_s, LONGEST_WAIT_S)
            elif response.status_code == 200:
                return response
            else:
                what, pause_s = f"answered {response.status_code}", self._retry_after(response)
            if left:
                time.sleep(pause_s)
        raise self._absent(what)

    def _within_deadline(self, body: bytes) -> Answer | None:
        """One attempt, None if the connection is refused; `timeout_s` bounds all of it, requests' own only silence."""
        outcome: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()

        def attempt() -> None:
            try:
                outcome.put(self._post(body))
            except Exception as error:
                outcome.put(error)

        threading.Thread(target=attempt, name="reward", daemon=True).start()
        try:
            result = outcome.get(timeout=self.config.timeout_s)
        except queue.Empty:
            raise self._late() from None
        if isinstance(result, Answer):
            return result
        if _refused(result):
            return None
        if isinstance(result, requests.Timeout):
            raise self._late() from None
        raise self.broken(RAISED, f"gave no answer: {type(result).__name__}: {one_line(str(result), 400)}") from result

    def _post(self, body: bytes) -> Answer:
        """The whole answer; ValueError for one that is longer than any, or in an encoding (gzip): none is asked for."""
        with requests.post(
            self.config.url,
            data=body,
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
            auth=self._authorised,  # also keeps requests from sending what ~/.netrc has
            timeout=self.config.timeout_s,
            proxies=NO_PROXY if self._here else None,  # HTTP_PROXY is about other machines
            allow_redirects=False,
            stream=True,
        ) as response:
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding.lower() != "identity":
                raise ValueError(f"the answer is encoded, which was not asked for: {shown(encoding)}")
            said = bytearray()
            for piece in response.iter_content(CHUNK):
                said += piece
                if len(said) > MOST_BYTES:
                    raise ValueError(f"the answer has more than {MOST_BYTES} bytes")
            return Answer(response.status_code, response.headers, bytes(said))

    def _authorised(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request

    def _retry_after(self, response: Answer) -> float:
        """Seconds that a busy server asks to wait; FailedError for every other answer."""
        status, asked = response.status_code, response.headers.get("Retry-After")
        if status not in BUSY or asked is None:
            hint = f" (token: the environment variable {self.config.token_variable})" if status in (401, 403) else ""
            raise self.broken(REFUSED, f"answered {status}{hint}: {words(response)}")
        wait_s = _seconds(asked)
        if wait_s is None or wait_s > self.config.timeout_s:
            raise self.broken(
                REFUSED,
                f"answered {status} with Retry-After: {one_line(asked, 80)}, and a wait must be at most "
                f"reward.timeout_s={self.config.timeout_s:g} seconds",
            )
        return wait_s

    def _late(self) -> FailedError:
        return self.broken(
            TIMED_OUT,
            f"did not answer within reward.timeout_s={self.config.timeout_s:g} seconds: raise it, or lower "
            f"{self.config.load}",
        )

    def _absent(self, what: str) -> FailedError:
        return self.broken(
            REFUSED,
            f"{what} {1 + self.config.retries} time(s): look whether it runs, or raise reward.retries "
            f"({self.config.retries})",
        )

    def broken(self, what: str, why: str) -> FailedError:
        """Why a request has no answer, with the server's address."""
        return FailedError(what, f"reward.url={self.config.url} {why}")


def words(response: Answer) -> str:
    """The beginning of what the server has said, for messages."""
    return shown(response.body[:800].decode(errors="replace"), 200)


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _refused(error: Exception) -> bool:
    """Whether the connection was refused, so that nothing can have been sent."""
    reason: Any = error.args[0] if isinstance(error, requests.ConnectionError) and error.args else None
    if isinstance(reason, MaxRetryError):
        reason = reason.reason
    return isinstance(reason, NewConnectionError) and isinstance(reason.__cause__, ConnectionRefusedError)


def _seconds(retry_after: str) -> float | None:
    """Seconds from now of a Retry-After header, a number or a date (RFC 9110, 10.2.3); None if it is neither."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _token(variable: str) -> str:
    """The bearer token, or "" where there is none; ValueError, without the token, if no header can carry it."""
    token = os.environ.get(variable, "").strip()
    if not (token.isascii() and token.isprintable()):
        raise ValueError(f"the environment variable {variable} must be a token of printable ASCII characters")
    return token
