"""One-shot weight transfer over memory that both processes can map, with the names and messages of vLLM's IPC engine.

    in the trainer    args = IPCTrainerSendWeightsArgs("http", url="http://127.0.0.1:8000")
                      IPCWeightTransferEngine.trainer_send_weights(model.named_parameters(), args)
    in the worker     engine = IPCWeightTransferEngine(None, None)
                      engine.receive_weights(engine.parse_update_info(message["update_info"]), model.load_weights)

One message, no versions: a `load_weights` that raises half-way leaves the worker's model mixed. `make_transfer` is the
way to updates that happen completely or not at all.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transfer.agreement.shown import one_line, shown
from transfer.agreement.wire import TOKEN_VARIABLE
from transfer.engine import inert_pickle
from transfer.engine.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo, parsed
from transfer.engine.handle_check import check
from transfer.engine.handles import Exporter, Importer
from transfer.engine.pledge import KEY, check_kept, pledge_of

if TYPE_CHECKING:
    import torch

TIMEOUT_S = 300.0  # for the receivers to acknowledge one update, seconds
CONNECT_TIMEOUT_S = 10.0
MAX_ERROR_BYTES = 64 * 1024  # of a server's answer that says what went wrong


@dataclass
class IPCTrainerSendWeightsArgs:
    """How the trainer reaches its receivers: one Ray actor handle or a list of them, or one server's URL."""

    mode: str
    llm_handle: Any = None
    url: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("ray", "http"):
            raise ValueError(f"mode must be 'ray' or 'http', got {self.mode!r}")
        if self.mode == "ray" and (self.llm_handle is None or not self.llm_handles):
            raise ValueError("llm_handle is required for 'ray' mode")
        if self.mode == "http" and not self.url:
            raise ValueError("url is required for 'http' mode")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must be like http://127.0.0.1:8000, got {self.url!r}")

    @property
    def llm_handles(self) -> list[Any]:
        """The Ray actor handles, one or several."""
        return list(self.llm_handle) if isinstance(self.llm_handle, list | tuple) else [self.llm_handle]


@dataclass
class IPCWeightTransferInitInfo(WeightTransferInitInfo):
    """There is nothing to agree on: a handle says all that a receiver needs."""


@dataclass
class IPCWeightTransferUpdateInfo(WeightTransferUpdateInfo):
    """The tensors of one update: entry i of each list is about the tensor `names[i]`.

    `ipc_handles[i]` is `{GPU UUID: fields}` (handles.py); JSON carries the list as base64 of a pickle, which is decoded
    into `ipc_handles` without running anything from it.
    """

    names: list[str]
    dtype_names: list[str]  # as "bfloat16"
    shapes: list[list[int]]
    ipc_handles: list[dict[str, Any]] | None = None
    ipc_handles_pickled: str | None = None

    def __post_init__(self) -> None:
        if (self.ipc_handles is None) == (self.ipc_handles_pickled is None):
            raise ValueError("exactly one of ipc_handles and ipc_handles_pickled must be given")
        if self.ipc_handles_pickled is not None:
            self.ipc_handles = _unpickled(self.ipc_handles_pickled)
            self.ipc_handles_pickled = None
        for field in ("names", "dtype_names", "shapes", "ipc_handles"):
            given = getattr(self, field)
            if not isinstance(given, list | tuple):
                raise ValueError(f"{field} must be a list (got {type(given).__name__})")
            if len(given) != len(self.names):
                raise ValueError(f"{field} must have as many entries as names: got {len(given)} and {len(self.names)}")
        if not all(isinstance(name, str) for name in self.names):
            raise ValueError("names must be strings")


class IPCWeightTransferEngine(WeightTransferEngine[IPCWeightTransferInitInfo, IPCWeightTransferUpdateInfo]):
    """Weights through CUDA IPC on GPUs and through shared memory on CPUs of one host."""

    init_info_cls = IPCWeightTransferInitInfo
    update_info_cls = IPCWeightTransferUpdateInfo

    def init_transfer_engine(self, init_info: IPCWeightTransferInitInfo) -> None:
        """Nothing: handles need no rendezvous."""

    def receive_weights(
        self,
        update_info: IPCWeightTransferUpdateInfo,
        load_weights: Callable[[Iterable[tuple[str, torch.Tensor]]], Any],
    ) -> None:
        """Call `load_weights([(name, tensor)])` for one tensor after the other, each still in the trainer's memory.

        Every handle is checked before the first tensor is loaded; ValueError names the tensor. On return the device has
        read everything: the trainer may write again. `load_weights` must copy what it wants to keep. ValueError at the
        end, too, if the trainer has gone on before: what was loaded may be a mixture.
        """
        assert update_info.ipc_handles is not None
        pledge = pledge_of(update_info.ipc_handles)
        told = zip(update_info.names, update_info.dtype_names, update_info.shapes, update_info.ipc_handles, strict=True)
        checked = [(name, _named(name, check, dtype, shape, handle)) for name, dtype, shape, handle in told]
        with Importer() as importer:
            for name, handle in checked:
                load_weights([(name, _named(name, importer.open, handle))])
        check_kept(pledge)

    def shutdown(self) -> None:
        """Nothing is held between updates."""

    @staticmethod
    def trainer_send_weights(
        iterator: Iterator[tuple[str, torch.Tensor]] | Iterable[tuple[str, torch.Tensor]],
        trainer_args: IPCTrainerSendWeightsArgs | Mapping[str, Any],
    ) -> None:
        """Send the (name, tensor) pairs; returns when every receiver has read them, which lets the memory go.

        RuntimeError with the server's own message if it refuses, TimeoutError after `TIMEOUT_S`.
        """
        args = trainer_args
        if not isinstance(args, IPCTrainerSendWeightsArgs):
            args = parsed(IPCTrainerSendWeightsArgs, args)
        with Exporter() as exporter:
            if args.mode == "ray":
                messages = _messages(iterator, exporter, len(args.llm_handles))
                _send_ray(list(zip(args.llm_handles, messages, strict=True)))
            else:
                assert args.url is not None
                message = _messages(iterator, exporter, 1)[0]
                message["ipc_handles_pickled"] = _pickled(message.pop("ipc_handles"))
                _send_http(f"{args.url.rstrip('/')}/update_weights", message)


def _messages(pairs: Iterable[tuple[str, torch.Tensor]], exporter: Exporter, receivers: int) -> list[dict[str, Any]]:
    """Each receiver's update_info, with its own handles."""
    names, dtype_names, shapes, handles = [], [], [], []
    for name, tensor in pairs:
        handles.append(exporter.add(name, tensor, receivers))
        names.append(name)
        dtype_names.append(str(tensor.dtype).removeprefix("torch."))
        shapes.append(list(tensor.shape))
    exporter.ready()
    if exporter.pledge is not None:
        for handle in handles[0]:
            handle[KEY] = exporter.pledge.claim
    told = {"names": names, "dtype_names": dtype_names, "shapes": shapes}
    return [{**told, "ipc_handles": [each[index] for each in handles]} for index in range(receivers)]


def _named(name: str, step: Callable[..., Any], *arguments: Any) -> Any:
    """`step(*arguments)`, whose ValueError then begins with the tensor's name."""
    try:
        return step(*arguments)
    except ValueError as error:
        raise ValueError(f"{shown(name)}: {error}") from error


# --- transports -------------------------------------------------------------------------------------------------------


def _send_ray(messages: list[tuple[Any, dict[str, Any]]]) -> None:
    import ray

    calls = [handle.update_weights.remote(dict(update_info=message)) for handle, message in messages]
    _, late = ray.wait(calls, num_returns=len(calls), timeout=TIMEOUT_S)
    if late:
        places = [index for index, call in enumerate(calls) if call in late]
        raise TimeoutError(f"update_weights: llm_handle {places} of {len(calls)} did not answer within {TIMEOUT_S} s")
    ray.get(calls, timeout=TIMEOUT_S)  # raises what a receiver raised


def _send_http(route: str, message: dict[str, Any]) -> None:
    import requests

    token = os.environ.get(TOKEN_VARIABLE)
    with requests.Session() as session:
        session.trust_env = False  # no proxy, no .netrc: the receiver is on this host
        session.headers.update({"Authorization": f"Bearer {token}"} if token else {})
        try:
            answer = session.post(
                route,
                json={"update_info": message},
                timeout=(CONNECT_TIMEOUT_S, TIMEOUT_S),
                allow_redirects=False,
                stream=True,
            )
            said = next(answer.iter_content(MAX_ERROR_BYTES), b"")
        except requests.Timeout as error:
            raise TimeoutError(f"{route} did not answer within {TIMEOUT_S} s") from error
        except requests.RequestException as error:
            raise RuntimeError(f"{route} cannot be reached: {one_line(str(error))}") from error
    if not 200 <= answer.status_code < 300:
        words = one_line(_message(said) or str(answer.reason), MAX_ERROR_BYTES)
        raise RuntimeError(f"{route} answered {answer.status_code}: {words}")


def _message(body: bytes) -> str:
    """What a server says went wrong: the text in the usual JSON forms, else the body as it is."""
    text = body.decode(errors="replace").strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    while isinstance(value, dict):
        value = next((value[key] for key in ("error", "detail", "message") if key in value), text)
    return value if isinstance(value, str) else text


# --- the pickled form, which vLLM's HTTP route takes ------------------------------------------------------------------


def _pickled(handles: Any) -> str:
    import pickle  # writing only; what arrives is read by inert_pickle

    return base64.b64encode(pickle.dumps(handles, protocol=4)).decode()


def _unpickled(text: Any) -> Any:
    if not isinstance(text, str):
        raise ValueError(f"ipc_handles_pickled must be a base64 string (got {type(text).__name__})")
    try:
        return inert_pickle.loads(base64.b64decode(text, validate=True))
    except binascii.Error as error:
        raise ValueError(f"ipc_handles_pickled is not base64: {error}") from None
