"""An unmodified vLLM server's routes over HTTP: one call, one deadline, and its own words in the error."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from transfer.agreement.shown import one_line
from transfer.agreement.wire import RemoteError, TransferError
from transfer.trainer import answers
from transfer.trainer.senders.kept_alive import KeptAlive, NotConnected

NOT_FOUND = 404
IDLE_S = 2.0  # vLLM ends connections that are idle for 5 s
NEEDS_DEV_MODE = (
    "start it with VLLM_SERVER_DEV_MODE=1 in its environment, on loopback: vLLM's --api-key guards /v1 only"
)


class Dialect(enum.Enum):
    """How a version of vLLM wants to be told of a weight update."""

    v24 = "0.24"  # a start has a JSON body; a finish has none, and no label
    v33 = "0.33"  # a finish may label the weights, and /weight_info tells the label; 0.32 speaks it, too


class Routes:
    """GET and POST to one server; RemoteError with the route as its verb, status 0 if no answer came in time.

    Nothing is repeated, no redirect followed. May be used from several threads at once.
    """

    def __init__(self, url: str, timeout_s: float, api_key: str | None) -> None:
        self.url = url.rstrip("/")
        self.name = f"vLLM ({self.url})"
        self.timeout_s = timeout_s
        self._prefix = urlsplit(self.url).path
        self._headers = "" if api_key is None else f"Authorization: Bearer {api_key}\r\n"
        self._server = KeptAlive(self.url, IDLE_S)

    def get(self, path: str, timeout_s: float | None = None) -> dict[str, Any]:
        """The JSON object of the answer; {} for an answer without one."""
        return self._ask("GET", path, None, timeout_s)

    def post(self, path: str, body: Mapping[str, Any] | None = None, timeout_s: float | None = None) -> dict[str, Any]:
        """The same, after a POST of `body`, or of nothing."""
        return self._ask("POST", path, body, timeout_s)

    def close(self) -> None:
        """Close the connections."""
        self._server.close()

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float | None) -> dict[str, Any]:
        verb = path.strip("/").partition("?")[0]
        deadline = self.timeout_s if timeout_s is None else timeout_s
        headers = self._headers + ("" if body is None else "Content-Type: application/json\r\n")
        payload = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        try:
            most = answers.most_bytes(body or {})
            answer = self._server.request(method, self._prefix + path, headers, payload, deadline, most)
        except NotConnected as error:
            raise RemoteError(self.name, verb, 0, f"no connection: {error}") from None
        except TimeoutError:
            raise RemoteError(self.name, verb, 0, f"no answer within {deadline:g} s") from None
        except OSError as error:
            raise RemoteError(self.name, verb, 0, f"the connection broke: {error}") from None
        if answer.status >= 500:
            self._server.close()  # after an exception uvicorn ends the connection, a moment after its answer
        if answer.status != 200:
            raise RemoteError(self.name, verb, answer.status, answers.words(answer.body, answer.reason))
        return answers.parsed(self.name, verb, answer.body)


def dialect_of(routes: Routes) -> tuple[Dialect, str | None]:
    """The dialect that the server speaks, and the label of its weights where it has one.

    /weight_info and /version have to agree; TransferError with what they said if they do not, or say nothing known.
    """
    label, info = _weight_info(routes)
    version, said = _version(routes)
    match info, version:
        case 200, _ if label is not None and (version is None or version > 24):
            return Dialect.v33, label
        case 404, 24:
            return Dialect.v24, None
    raise TransferError(
        f"{routes.name}: cannot tell which dialect it speaks: /weight_info answers {info}, /version says {said}. "
        "Known are 0.24 (404) and 0.32 to 0.33 (200 with a weight_version)"
    )


def _weight_info(routes: Routes) -> tuple[str | None, int]:
    try:
        label = routes.get("/weight_info").get("weight_version")
    except RemoteError as error:
        if error.status == 0:
            raise TransferError(str(error)) from error
        return None, error.status
    return (label if isinstance(label, str) else None), 200


def _version(routes: Routes) -> tuple[int | None, str]:
    """The n of 0.n, and the version in full."""
    try:
        text = str(routes.get("/version").get("version"))
    except RemoteError as error:
        if error.status == 0:
            raise TransferError(str(error)) from error
        return None, f"nothing (status {error.status})"
    found = re.match(r"0\.(\d{1,4})(?!\d)", text)
    return (int(found[1]) if found else None), one_line(text, 80)
