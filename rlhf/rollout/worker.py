"""A rollout worker: a policy of its own that samples completions and takes weight updates.

`Worker` has one method per verb of `transfer.agreement.wire.ROUTES`, a JSON object in and a JSON object out. It runs
in a process of its own behind HTTP (transfer/worker/serve.py), as a Ray actor, or in the trainer's process around the
learner's own module.

    python -m rlhf.rollout.worker              the spec is one JSON line on stdin; ends when stdin does
    python -m rlhf.rollout.worker spec.json    a worker that stands alone, for transfer.sender.url
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import __version__
from rlhf.monitor.gpu import GPU_MEMORY, gpu_peak
from rlhf.monitor.traces import Traces
from rlhf.rollout import completions
from rlhf.rollout.build import build_model, limits_of
from rlhf.rollout.engine import Engine, Turn
from rlhf.rollout.gpus import claim
from rlhf.rollout.pause_gate import PAUSE_MODES, PauseGate
from rlhf.rollout.spec import WorkerSpec
from transfer import make_receiver
from transfer.agreement import wire
from transfer.agreement.journal import Journal
from transfer.agreement.protocol import Phase
from transfer.agreement.wire import Refused

if TYPE_CHECKING:
    from transfer.worker.receiver import Receiver

Body = Mapping[str, Any]
Answer = dict[str, Any]


class Worker:
    """One rollout worker: an engine, and the receiver of its weights; a method per verb, Refused if it will not."""

    def __init__(self, engine: Engine, receiver: Receiver, limits: completions.Limits, log: Path | None = None) -> None:
        """`log`: of the process that is this worker alone, in the folder of its run; None of any other."""
        self._engine = engine
        self._alone = log is not None
        self._traces = Traces(log)
        self._receiver = receiver
        self._limits = limits
        self._gate = PauseGate()
        self._asleep = False

    @classmethod
    def around(cls, model: Any, endpoint: Mapping[str, Any], journal: str = "", invariant: bool = False) -> Worker:
        """A worker that samples from a transformers causal LM."""
        return cls(*_around(model, endpoint, journal, invariant=invariant))

    @classmethod
    def from_spec(cls, spec: WorkerSpec) -> Worker:
        """A worker with a model of its own; this process then computes with `spec.threads` threads."""
        return cls(*parts_of(spec), spec.log)

    def completions(self, body: Body) -> Answer | bytes:
        """Answer the message of completions.py, as JSON or as columns; 503 while paused or without weights."""
        request = completions.parse(body, self._limits)
        with self._gate.generating(), self._receiver.serving() as weights:
            turn = Turn(
                lambda: None if self._gate.aborting() else weights(), lambda: self._gate.aborting() or weights.due
            )
            sampling = replace(request.sampling, steady=weights.steady, uncut=weights.uncut)
            samples = self._engine.generate(request.prompts, request.seeds, sampling, turn)
        return completions.answer(request, samples)

    def pause(self, body: Body) -> Answer:
        """Let no new completion start until `resume`; by `mode`, running ones are cut short (abort, the default), or
        waited for (wait), or neither (keep: they end under the weights they began with)."""
        wire.only(dict(body), {"mode": PAUSE_MODES.__contains__, "clear_cache": lambda value: isinstance(value, bool)})
        self._gate.pause(body.get("mode", "abort"))
        return {"status": "paused"}

    def resume(self, body: Body) -> Answer:
        """Let completions start again; 409 while asleep, or while the weights are not whole."""
        wire.only(dict(body), {})
        if self._receiver.phase is Phase.QUARANTINED:
            raise Refused(409, "an update broke off, or the weights were withdrawn: finish one before resuming")
        if self._asleep:
            raise Refused(409, "the worker is asleep: wake it up first")
        self._gate.resume()
        return {"status": "resumed"}

    def sleep(self, body: Body) -> Answer:
        """Wait for running completions, serve none until `wake_up`, and give GPU memory back.

        Level 1 gives back what is cached. Level 2, which engine hf does not know because its weights may be the
        trainer's memory, gives the weights away, too: nothing is served before an update has brought new ones.
        """
        levels = [form for level in self._engine.sleep_levels for form in (level, str(level))]
        wire.only(dict(body), {"level": lambda value: value in levels and type(value) in (int, str)})
        level = int(body.get("level", 1))
        self._gate.pause("wait")
        self._asleep = True
        if level > 1:
            self._receiver.lose_weights()
        self._engine.sleep(level)
        return {"is_sleeping": True}

    def wake_up(self, body: Body) -> Answer:
        """Serve again, once all is there; `tags` (vLLM's: weights, kv_cache) name a part that is wanted first."""
        wire.only(
            dict(body), {"tags": lambda value: all(map(wire.is_str, value if isinstance(value, list) else [value]))}
        )
        tags = body.get("tags", [])
        if self._asleep and self._engine.wake_up(tags if isinstance(tags, list) else [tags]):
            self._asleep = False
            self._gate.resume()
        return {"is_sleeping": self._asleep}

    def is_sleeping(self, body: Body) -> Answer:
        """Whether the worker is asleep."""
        wire.only(dict(body), {})
        return {"is_sleeping": self._asleep}

    def start_profile(self, body: Body) -> Answer:
        """Trace this process from now on, into `profile/` of its run; 409 if it cannot."""
        wire.only(dict(body), {"step": wire.is_int})
        self._traces.start(body.get("step", 0))
        return {"is_profiling": True}

    def stop_profile(self, body: Body) -> Answer:
        """End the trace and write it; 409 if none was begun, or it is lost."""
        wire.only(dict(body), {})
        return {"is_profiling": False, "said": self._traces.stop()}

    def version(self, body: Body) -> Answer:
        """What answers: this package, whose routes are vLLM's, and its version."""
        wire.only(dict(body), {})
        return {"version": f"rlhf-transfer {__version__}"}

    def is_paused(self, body: Body) -> Answer:
        """Whether completions are refused for now."""
        wire.only(dict(body), {})
        return {"is_paused": self._gate.paused}

    def health(self, body: Body) -> Answer:
        """That the process answers, no more."""
        wire.only(dict(body), {})
        return {"status": "ok"}

    def get_world_size(self, body: Body) -> Answer:
        """How many processes hold the model: one."""
        wire.only(dict(body), {"include_dp": lambda value: isinstance(value, bool)})
        return {"world_size": 1}

    def init_weight_transfer_engine(self, body: Body) -> Answer:
        """Agree with a trainer on what will be sent."""
        return self._receiver.init_weight_transfer_engine(dict(body))

    def start_weight_update(self, body: Body) -> Answer:
        """Begin an update; the old weights go on serving."""
        return self._receiver.start_weight_update(dict(body))

    def update_weights(self, body: Body) -> Answer:
        """Stage weights."""
        return self._receiver.update_weights(dict(body))

    def finish_weight_update(self, body: Body) -> Answer:
        """Make the staged weights the live ones, between two completions."""
        return self._receiver.finish_weight_update(dict(body))

    def abort_weight_update(self, body: Body) -> Answer:
        """Forget what is staged."""
        return self._receiver.abort_weight_update(dict(body))

    def withdraw_weights(self, body: Body) -> Answer:
        """Serve nothing until a newer version is finished."""
        return self._receiver.withdraw_weights(dict(body))

    def weight_info(self, body: Body) -> Answer:
        """The live version."""
        return self._receiver.weight_info(dict(body))

    def prompt(self, verb: str) -> bool:
        """Whether a verb of an update would be done at once (Receiver.prompt)."""
        return self._receiver.prompt(verb)

    def status(self, body: Body) -> Answer:
        """Where the worker stands in the state machine of an update, and how much of a GPU its process has taken."""
        used = gpu_peak() if self._alone else None
        return self._receiver.status(dict(body)) | ({} if used is None else {GPU_MEMORY: used})


def parts_of(spec: WorkerSpec) -> tuple[Engine, Receiver, completions.Limits]:
    """What a worker of this spec is made of; this process then computes with `spec.threads` threads."""
    import torch

    torch.set_num_threads(spec.threads)
    if spec.engine == "vllm":
        from rlhf.rollout.vllm import parts

        return parts(spec)
    return _around(build_model(spec), spec.endpoint, spec.journal, spec.recompute_cache, spec.batch_invariant)


def _around(
    model: Any, endpoint: Mapping[str, Any], journal: str, recomputes: bool = False, invariant: bool = False
) -> tuple[Engine, Receiver, completions.Limits]:
    from rlhf.models.adapter import receiving
    from rlhf.rollout.hf import HfEngine

    receiver = make_receiver(endpoint, receiving(model), Journal(Path(journal) if journal else None))
    return HfEngine(model, recomputes, invariant), receiver, limits_of(model.config.get_text_config())


def main(arguments: list[str]) -> None:
    """Serve over HTTP, by a spec from the file named in `arguments` or from the first line of stdin."""
    from transfer.worker.serve import serve_alone, serve_parent
    from transfer.worker.stacks import dumps_stacks_when_asked

    dumps_stacks_when_asked()
    spec = WorkerSpec.from_json(Path(arguments[0]).read_bytes() if arguments else sys.stdin.buffer.readline())
    os.environ.setdefault("OMP_NUM_THREADS", str(spec.threads))  # before torch is imported
    claim(spec.visible)
    serve = serve_alone if arguments else serve_parent
    serve(spec, lambda: Worker.from_spec(spec))


if __name__ == "__main__":
    main(sys.argv[1:])
