"""The weights of one vLLM worker: the trainer's memory, mapped into this process, and the ways from it into the model.

The first update goes through vLLM's own reloading, which is right for every model, and slow. Then the loader is
recorded (recorder.py), and if the model holds exactly what the recorded copies would have written, they replace the
loader from then on. If not, vLLM's own way stays, and the reason is logged: weights that are quantised, repacked for a
kernel or changed by the loader need it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch

from transfer.agreement.manifest import Manifest
from transfer.backends.base import Intake, Staged
from transfer.backends.make import make_intake
from transfer.config import Take
from transfer.memory.digest import digest_of
from transfer.memory.finite import not_finite
from transfer.memory.one_pass import OnePass, available
from transfer.memory.rows import Rows, parts_of, places_of, whole_of
from transfer.memory.sums import SUMS
from transfer.vllm.described import Described, parts_at
from transfer.vllm.recorder import Recording, Unsupported, record
from transfer.vllm.replay import Replay, synchronize

LOG = logging.getLogger(__name__)
DERIVED_NUMEL = 4096  # a tensor beside the parameters with as many elements may have been made from them
CACHES = ("kv_cache", "cos_sin_cache", "inv_freq")  # attributes that depend on no weight

Pairs = Iterable[tuple[str, torch.Tensor]]


class Loader(Protocol):
    """vLLM's own way: the whole of it, and the model's loader alone."""

    def reload(self, pairs: Pairs) -> None: ...
    def load(self, pairs: Pairs) -> None: ...


class RankWeights:
    """Takes updates into `model`, a vLLM model or its shard, where it is; `own_way` is vLLM's.

    `number` of `count`: which of the engine's ranks this is.
    """

    def __init__(
        self, model: torch.nn.Module, device: torch.device, own_way: Loader, number: int = 0, count: int = 1
    ) -> None:
        self._number, self._count = number, count
        self._model = model
        self._device = device
        self._own_way = own_way
        self._intake: Intake | None = None
        self._manifest = Manifest((), 0)
        self._described: Described | None = None
        self._replays: dict[int, Replay] = {}  # by the staged dict, which a slot has for good
        self._reads: dict[int, OnePass] = {}  # by the same, of this rank's share of a digest
        self._proven: Recording | None = None
        self._why = ""  # why there is no replay

    def prepare(self, endpoint: Mapping[str, Any], manifest: Mapping[str, Any], where: Mapping[str, Any]) -> None:
        """Map the trainer's memory; ValueError if it cannot be."""
        if endpoint.get("take") == Take.view.value:
            raise ValueError(
                "inside vLLM weights are copied, because its CUDA graphs have their addresses: transfer.take must be "
                "copy (got view)"
            )
        intake = make_intake(endpoint)
        self.close()
        self._manifest = Manifest.from_json(manifest)
        intake.prepare(self._manifest, where, self._device)
        self._intake = intake

    def copy(self, version: int, where: Mapping[str, Any], with_digest: bool) -> dict[str, Any]:
        """Make the staged weights the model's; `digest` if it cost nothing, and whether all were `finite`.

        `still`: whether they have held still meanwhile; if not, the model holds a mixture.
        """
        staged = self._staged(version, where)
        found = self._replay_of(staged)
        if found is not None:
            digest, finite = found.run(with_digest, self._unchecked)
        else:
            digest, finite = None, self._is_finite(staged)
            if finite:
                self._own_way.reload(self._named(staged))
                synchronize(self._device)
                self._prove(staged)
        return {"digest": digest, "finite": finite, "still": self._intake is not None and self._intake.still(version)}

    def digest(self, version: int, where: Mapping[str, Any], like: str) -> str:
        """Of the staged weights; sums of this rank's share of them, which add up, and else "" of all but the first."""
        staged = self._staged(version, where)
        if like.startswith(SUMS):
            return self._sums(staged, like)
        return "" if self._number else self._whole_digest(staged, like)

    def live_digest(self, version: int, where: Mapping[str, Any], like: str) -> str:
        """Of the model's own bytes, put in the trainer's order; ValueError where nobody can tell.

        Where vLLM's own loader has loaded bytes that nobody had looked at before, of those.
        """
        staged = self._staged(version, where)
        found = self._replays.get(id(staged))
        if found is not None:
            return found.live_digest(like)
        if self.settled:
            raise ValueError(
                "transfer.verify=full reads the model's own weights, which vLLM holds in another form than they came "
                f"in: use transfer.verify=digest ({self._why})"
            )
        return self._whole_digest(staged, like)

    @property
    def settled(self) -> bool:
        """Whether staged bytes stay as they are, so that they can be verified before they are copied."""
        return self._intake is not None and self._intake.settled

    @property
    def _unchecked(self) -> bool:
        """Whether nobody has looked yet for values that are not finite."""
        return self._intake is not None and self._intake.unchecked

    @property
    def plan(self) -> str:
        """How weights get here, in words."""
        plans = [replay.plan for replay in self._replays.values()]
        return plans[0] if plans else f"vLLM's own loader{f': {self._why}' if self._why else ''}"

    def close(self) -> None:
        """Give up the trainer's memory; the model's is its own."""
        self._replays, self._reads, self._proven, self._described, self._why = {}, {}, None, None, ""
        if self._intake is not None:
            self._intake.close()
            self._intake = None

    def _staged(self, version: int, where: Mapping[str, Any]) -> Staged:
        if self._intake is None:
            raise ValueError("no trainer has said yet where its weights are: initialise the weight transfer first")
        return self._intake.stage(version, where)

    def _whole_digest(self, staged: Staged, like: str) -> str:
        placed = [staged[entry.name] for entry in self._manifest.entries]
        return digest_of(parts_of(placed), like, places_of(placed))

    def _sums(self, staged: Staged, like: str) -> str:
        """Of every `count`th part: of a tensor's rows those of one of the trainer's ranks, which may be on this GPU."""
        assert self._intake is not None
        if (found := self._reads.get(id(staged))) is not None:
            return found.digest()
        shares = [
            (part, place)
            for number, entry in enumerate(self._manifest.entries)
            for turn, (_, part, place) in enumerate(parts_at(staged[entry.name], entry.offset))
            if part.numel() and (turn if isinstance(staged[entry.name], Rows) else number) % self._count == self._number
        ]
        parts, places = [part for part, _ in shares], [place for _, place in shares]
        if not parts or not available(self._device) or not all(part.is_cuda for part in parts):
            return digest_of(parts, like, places)
        one_pass = OnePass(parts, None, self._device, owner=self._intake.owner, offsets=places)
        if any(staged is slot for slot in self._intake.slots):
            self._reads[id(staged)] = one_pass
        return one_pass.digest()

    def _is_finite(self, staged: Staged) -> bool:
        """Whether all values are that vLLM's own loader is about to take."""
        whole = {name: tensor for name, tensor in staged.items() if isinstance(tensor, torch.Tensor)}
        rows = (part for name, tensor in staged.items() if name not in whole for part in parts_of([tensor]))
        floats = (part for part in rows if part.is_floating_point())
        return not_finite(whole, self._manifest) is None and all(bool(torch.isfinite(part).all()) for part in floats)

    def _named(self, staged: Staged) -> Iterator[tuple[str, torch.Tensor]]:
        """Under every name of each: the model's loader knows which of two tied ones it wants."""
        for entry in self._manifest.entries:
            tensor = whole_of(staged[entry.name], entry.shape, entry.torch_dtype, self._device)
            yield from ((name, tensor) for name in entry.names)

    def _replay_of(self, staged: Staged) -> Replay | None:
        """The replay from this slot; made now, if another slot's has been proven."""
        if id(staged) not in self._replays and self._proven is not None:
            self._replays[id(staged)] = self._replayed(self._proven, staged)
        return self._replays.get(id(staged))

    def _prove(self, staged: Staged) -> None:
        """After vLLM's own way: record the loader, and trust the copies if they lead to the very same bytes."""
        assert self._intake is not None
        if self._why or not any(staged is slot for slot in self._intake.slots):
            return
        try:
            if made := _derived(self._model):
                raise Unsupported(f"{made} may be made from weights")
            self._described = Described(self._manifest)
            found = self._recorded(self._described.tensors)
            replay = self._replayed(found, staged)
            if not replay.holds_now():
                raise Unsupported("the model holds its weights in another form than they come in")
        except Exception as error:  # a loader may raise anything when its weights have been repacked
            self._why = f"{error}" if isinstance(error, Unsupported) else f"{type(error).__name__}: {error}"
            LOG.warning("weights go through vLLM's own loader at every update: %s", self._why)
            return
        self._proven, self._replays[id(staged)] = found, replay
        LOG.info("weights are copied from now on: %s", self.plan)

    def _recorded(self, described: Mapping[str, torch.Tensor]) -> Recording:
        return record(self._model, lambda: self._own_way.load(self._named(described)), described.values())

    def _replayed(self, found: Recording, staged: Staged) -> Replay:
        assert self._intake is not None and self._described is not None
        return Replay(found, self._described, staged, self._intake.owner)


def _derived(model: torch.nn.Module) -> str | None:
    """A large floating-point tensor that some layer holds beside its parameters and buffers; None if there is none."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name.startswith("_") or name in CACHES or not isinstance(value, torch.Tensor):
                continue
            if (
                value.is_floating_point()
                and value.numel() >= DERIVED_NUMEL
                and not isinstance(value, torch.nn.Parameter)
            ):
                return f"{path}.{name}"
    return None
