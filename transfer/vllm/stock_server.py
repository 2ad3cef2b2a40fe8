"""One unmodified vLLM server, as its trainer sees it: what it serves, whether it sleeps, and the steps of an update.

vLLM says "asleep" of a server that is merely paused, too, and never who has paused it: what this client has done itself
it remembers, and anything else it does not touch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from transfer.agreement.shown import shown
from transfer.agreement.wire import RemoteError, TransferError
from transfer.config import InFlight
from transfer.vllm.stock_completions import complete
from transfer.vllm.stock_payload import Payload, StockIpc
from transfer.vllm.stock_routes import NEEDS_DEV_MODE, NOT_FOUND, Dialect, Routes, dialect_of

if TYPE_CHECKING:
    import torch

ASK_S = 5.0  # deadline of questions after a failure: the server may be gone
SLEEPING_TAGS = frozenset({"weights", "kv_cache"})
MAX_RANKS = 2**16  # of one server
LISTED = 10  # differences shown
Plan = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdatePolicy:
    """What becomes of completions and caches at an update, and what is looked at before."""

    in_flight: InFlight = InFlight.abort  # vLLM's pause modes, by the same names
    clear_cache: bool = True  # the prefix cache holds what the old weights computed
    finite: bool = True  # refuse weights with NaN or infinities
    found_paused: bool = False  # the server is awake, but an earlier trainer may have left it paused, its weights torn


class StockServer:
    """One server; after `open`, `version` is what it serves (None: nothing that the trainer knows)."""

    def __init__(
        self,
        url: str,
        timeout_s: float = 60.0,
        payload: Payload | None = None,
        policy: UpdatePolicy = UpdatePolicy(),
        api_key: str | None = None,
    ) -> None:
        self.routes = Routes(url, timeout_s, api_key)
        self.name = self.routes.name
        self.payload: Payload = StockIpc() if payload is None else payload
        self.policy = policy
        self.dialect: Dialect | None = None
        self.version: int | None = None
        self.world_size = 0
        self.broken: str | None = None  # why its weights may be no whole version
        self.held: str | None = None  # why it waits, paused, although they are
        self.plan: Plan = {}
        self._label: str | None = None  # what the server calls its weights
        self._paused = False  # by us
        self._updating = False
        self._asleep: set[str] = set()  # what we have put to sleep and not woken

    @property
    def asleep(self) -> bool:
        """Whether we have put anything to sleep and not woken it."""
        return bool(self._asleep)

    # --- agreement ----------------------------------------------------------------------------------------------------

    def open(self, weights: Mapping[str, torch.Tensor], version: int | None = None) -> None:
        """Agree on what every update will bring; TransferError if the server is not fit for any.

        `version`: the one whose weights the server has loaded itself. Where the policy says `found_paused` there is
        none, and the first update resumes the server.
        """
        sleeping = self._found()
        self.dialect, self._label = dialect_of(self.routes)
        if self.policy.found_paused:
            self._paused, self.broken, version = True, "an earlier trainer has left it paused", None
        elif sleeping:
            raise TransferError(_not_awake(self.name))
        self.plan = {name: _form(tensor) for name, tensor in weights.items()}
        self.version = version
        self.agree()

    def agree(self) -> None:
        """Tell the server, or tell it anew, what its backend agrees on once; TransferError if it does not."""
        assert self.dialect is not None
        try:
            init_info = self.payload.init_info(self.dialect, self.world_size)
            self.routes.post("/init_weight_transfer_engine", {"init_info": init_info})
        except (RemoteError, ValueError) as error:
            prefix = "" if isinstance(error, RemoteError) else f"{self.name}: "
            raise TransferError(f"{prefix}{error}") from error

    def _found(self) -> bool:
        """A server that is well, with the routes that an update needs: whether it says that it sleeps."""
        try:
            self.routes.get("/health")
        except RemoteError as error:
            raise TransferError(f"{error}: is it running, and vLLM?") from error
        try:
            self.world_size = _ranks(self.routes.get("/get_world_size?include_dp=true")["world_size"])
            return _yes_or_no(self.routes.get("/is_sleeping")["is_sleeping"])
        except RemoteError as error:
            raise TransferError(f"{error}" + (f": {NEEDS_DEV_MODE}" if error.status == NOT_FOUND else "")) from error
        except (KeyError, ValueError) as error:
            raise TransferError(f"{self.name}: its answers are not vLLM's: {error!r}") from error

    def verified(self, weights: Mapping[str, torch.Tensor], version: int) -> dict[str, Any]:
        """The update_info for these tensors, which fit; TransferError otherwise, and nobody has been told anything."""
        if wrong := _differences(self.plan, weights):
            raise TransferError(f"{self.name}: version {version} is not what was agreed on: " + "; ".join(wrong))
        try:
            return self.payload.update_info(weights, version)
        except (ValueError, RuntimeError) as error:
            raise TransferError(f"{self.name}: version {version} cannot be sent: {error}") from error

    # --- the steps of an update; stock.py puts them together ----------------------------------------------------------

    def check_awake(self) -> None:
        """TransferError if it sleeps."""
        if self.dialect is None:
            raise TransferError(f"{self.name}: open it before an update")
        if "weights" in self._asleep:
            raise TransferError(
                f'{self.name}: its weights are asleep: wake_up(["weights"]) first, or the update kills it'
            )
        if not self._paused and not self._asleep and self.routes.get("/is_sleeping").get("is_sleeping"):
            raise TransferError(_not_awake(self.name))

    def pause(self) -> None:
        """Stop sampling, as the policy says; nothing where this client has stopped it before."""
        if self._asleep or (self._paused and self._ask_paused()):
            return
        clear = str(self.policy.clear_cache).lower()
        try:
            self.routes.post(f"/pause?mode={self.policy.in_flight.value}&clear_cache={clear}")
        except RemoteError:
            self._let_go()
            raise
        self._paused = True

    def start(self) -> None:
        """From here on the weights are no version until they are finished."""
        self._updating = True
        body = {"is_checkpoint_format": self.payload.reloads} if self.dialect is Dialect.v24 else None
        self.routes.post("/start_weight_update", body)

    def send(self, update_info: Mapping[str, Any]) -> None:
        """All tensors, in one message; the server has read them when it answers."""
        self.routes.post("/update_weights", {"update_info": update_info})

    def finish(self, version: int) -> None:
        """The weights are whole again, and are `version`."""
        label = str(version)
        try:
            self.routes.post("/finish_weight_update", {"weight_version": label} if self._labels else None)
        except RemoteError as error:
            if error.status or not self._labelled(label):  # else only its answer was late or got lost
                raise
        self.broken, self.held, self._updating, self.version = None, None, False, version
        self._label = label if self._labels else None

    def resume(self) -> None:
        """Sample again: TransferError unless the weights are whole; nothing if this client has not paused it."""
        if self._updating or self.broken or self.held:
            raise TransferError(f"{self.name} stays paused: {self.broken or self.held or 'it is being updated'}")
        if not self._paused or self._asleep:
            return  # vLLM resumes by itself when the last tag wakes up
        try:
            self.routes.post("/resume")
        except RemoteError as error:
            if error.status or self._ask_paused() is not False:
                raise TransferError(f"{error}; its weights are whole, version {self.version}: resume it") from error
        self._paused = False

    def keep_paused(self, why: str) -> str:
        """Make sure that it samples nothing, after a failure; in words, whether that is so."""
        self.broken, self._updating = why, False
        paused = self._ask_paused()
        if paused is False:  # it was started again, or somebody has resumed it
            with contextlib.suppress(RemoteError):
                self.routes.post("/pause?mode=abort", None, ASK_S)
                paused = self._ask_paused()
        self._paused = True
        return {True: "is kept paused", False: "is NOT paused", None: "does not say whether it is paused"}[paused]

    @property
    def _labels(self) -> bool:
        return self.dialect is Dialect.v33

    def _labelled(self, label: str) -> bool:
        """After a time-out: whether the server has finished the version, which it was not called before."""
        if not self._labels or self._label == label:
            return False
        try:
            return bool(self.routes.get("/weight_info", ASK_S).get("weight_version") == label)
        except RemoteError:
            return False

    def _ask_paused(self) -> bool | None:
        """None: no answer."""
        try:
            return _yes_or_no(self.routes.get("/is_paused", ASK_S)["is_paused"])
        except (RemoteError, KeyError, ValueError):
            return None

    def _let_go(self) -> None:
        """After a pause that failed, or is not complete in time: the weights are as they were, so it may go on."""
        self._paused = self._ask_paused() is not False
        if self._paused and not (self.broken or self.held):
            with contextlib.suppress(RemoteError):
                self.routes.post("/resume", None, ASK_S)
                self._paused = False

    # --- sleep --------------------------------------------------------------------------------------------------------

    def sleep(self, level: int = 1) -> None:
        """Give GPU memory back: 1 keeps the weights in host memory, 2 drops them, so that an update must follow."""
        self.routes.post(f"/sleep?level={level}&mode={self.policy.in_flight.value}")
        if level == 0:  # only stops sampling
            self._paused = True
            return
        self._asleep |= SLEEPING_TAGS
        if level == 2:
            self.broken, self.version = "sleep(level=2) has dropped its weights", None

    def wake_up(self, tags: Sequence[str] = ()) -> None:
        """Take the memory of these tags (all by default) again; the last one resumes, so the weights must be whole."""
        left = self._asleep - set(tags or SLEEPING_TAGS)
        if not left and (why := self.broken or self.held):
            raise TransferError(
                f'{self.name}: to wake it up would resume it, and {why}: wake_up(["weights"]), update it, then '
                'wake_up(["kv_cache"])'
            )
        self.routes.post("/wake_up" + ("?" + urlencode([("tags", tag) for tag in tags]) if tags else ""))
        self._asleep = left
        self._paused = self._paused and bool(left)

    def reset_prefix_cache(self) -> None:
        """Forget what was computed for prompts; TransferError if the server could not (0.24 does not tell)."""
        if self.routes.post("/reset_prefix_cache").get("success") is False:
            raise TransferError(f"{self.name}: its prefix cache is in use and was not reset")

    # --- sampling -----------------------------------------------------------------------------------------------------

    def complete(self, body: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """`{"choices": [...]}` as our own worker answers the same message (stock_completions.py); RemoteError.

        Refused with status 503 while there is no version to sample from, and if the server says that its weights are
        not those which it was given last. Where the version changed meanwhile, nobody knows which tokens are of which:
        such a sample counts as cut short.
        """
        version = self.version
        if version is None or self.broken or self.held:
            why = self.broken or self.held or "no version of the weights has arrived yet"
            raise RemoteError(self.name, "completions", 503, why)
        self._check_label()
        choices = complete(self.routes, body, self.routes.timeout_s if timeout_s is None else timeout_s)
        if self.version == version and self.broken is None:
            self._check_label()
        else:
            choices = [{**choice, "finish_reason": "abort"} for choice in choices]
        return {"choices": [{**each, "weight_versions": [[version, len(each["token_ids"])]]} for each in choices]}

    def close(self) -> None:
        """Close the connections; the server stays as it is."""
        self.payload.release()
        self.routes.close()

    def _check_label(self) -> None:
        """A server that was started again, or updated by somebody else, has another label."""
        if self._labels and self._label is not None:
            found = self.routes.get("/weight_info").get("weight_version")
            if found != self._label:
                why = (
                    f"its weights are called {shown(found)}, not {shown(self._label)}: it was started again or updated"
                )
                why += " by others"
                raise RemoteError(self.name, "completions", 503, why)


def _not_awake(name: str) -> str:
    return (
        f"{name}: it sleeps, or others have paused it (vLLM says the same of both). An update crashes a server that "
        "sleeps: POST /wake_up to it, or, if an earlier trainer has left it paused, set rollout.found_paused=true"
    )


def _ranks(given: Any) -> int:
    if type(given) is not int or not 0 < given <= MAX_RANKS:
        raise ValueError(f"{shown(given)} is no number of ranks")
    return given


def _yes_or_no(given: Any) -> bool:
    if not isinstance(given, bool):
        raise ValueError(f"{shown(given)} is not true or false")
    return given


def _form(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _differences(plan: Plan, weights: Mapping[str, torch.Tensor]) -> list[str]:
    """How the tensors differ from the plan, the first ten and a count of the rest."""
    found = {name: _form(tensor) for name, tensor in weights.items()}
    lines = [f"missing: {name}" for name in sorted(plan.keys() - found)]
    lines += [f"unexpected: {name}" for name in sorted(found.keys() - plan)]
    for name in sorted(plan.keys() & found):
        for what, agreed, given in zip(("dtype", "shape"), plan[name], found[name], strict=True):
            lines += [f"{what}: {name} is {given}, not {agreed}"] if agreed != given else []
    return lines[:LISTED] + ([f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else [])
