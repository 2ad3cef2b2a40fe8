"""The process under attack: a real worker behind its real HTTP app, and an audit hook that sees what it should not do.

    python tests/fuzz/target.py       a job (JSON) a line on stdin, a report (JSON) a line on stdout

Jobs: {"do": "start", "seed", "way", "hole", "folder"} first, then {"do": "fuzz", "count"}, here in this process, and
{"do": "look"}; {"do": "place", "version"} tells where a version's weights wait.
The trainer that the worker would have lives in this process, too: its shared memory is real.
"""

from __future__ import annotations

import asyncio
import collections
import ctypes
import fcntl
import gc
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
os.environ["OMP_NUM_THREADS"] = "1"

import holes  # noqa: E402
import jsonschema_rs  # noqa: E402
import torch  # noqa: E402
from traffic import SESSION, VERBS, Sent, Traffic  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen3Config  # noqa: E402

from rlhf.rollout.spec import WorkerSpec  # noqa: E402
from rlhf.rollout.worker import Worker  # noqa: E402
from transfer.agreement.manifest import Manifest  # noqa: E402
from transfer.agreement.wire import ROUTES  # noqa: E402
from transfer.backends.arena import ArenaPublisher, LivePublisher  # noqa: E402
from transfer.backends.disk import DiskPublisher  # noqa: E402
from transfer.config import DiskConfig, IpcConfig, SenderConfig, Staging, Take  # noqa: E402
from transfer.engine.handle_check import ALIGN  # noqa: E402
from transfer.engine.handles import Exporter  # noqa: E402
from transfer.memory.digest import digest_of  # noqa: E402
from transfer.memory.sums import as_bytes  # noqa: E402
from transfer.worker import serve  # noqa: E402
from transfer.worker.app import make_app  # noqa: E402
from transfer.worker.openapi import document  # noqa: E402

TOKEN = "f" * 64
LIFE = 400  # messages to one worker; then another, so that both of update_weights' forms are met in every state
STOP = 5  # violations; where one is planted, the first is enough, and each may take seconds
MAX_MEMORY = 48 * 2**20, 40  # bytes that a message may take while it is answered, and so many more for each of its own
MAY_BE_REFUSED = ("completions", "init_weight_transfer_engine", "withdraw_weights", "start_profile", "stop_profile")
VOCABULARY = 12
M_MMAP_THRESHOLD = -3  # malloc.h
MMAP_THRESHOLD = 2**17  # or glibc raises it, and large messages, which this process makes for itself, leave holes in
# its heap that look like growth
WAYS = {
    "arena view": IpcConfig(sender=SenderConfig()),
    "arena copy": IpcConfig(sender=SenderConfig(), take=Take.copy),
    "live copy": IpcConfig(sender=SenderConfig(), staging=Staging.live, take=Take.copy),
    "live view": IpcConfig(sender=SenderConfig(), staging=Staging.live, take=Take.view),
    "disk": DiskConfig(sender=SenderConfig()),
}


def tiny(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "vocab_size": VOCABULARY,
    }
    return AutoModelForCausalLM.from_config(Qwen3Config(**sizes, **heads, eos_token_id=1, pad_token_id=0)).eval()


class Audit:
    """Records every audit event that a worker has no business to cause: all but those known to be harmless."""

    HARMLESS = frozenset(
        {
            *("builtins.id", "mmap.__new__", "socket.__new__", "array.__new__", "_thread.start_new_thread"),
            *("sys.set_asyncgen_hook_firstiter", "sys.set_asyncgen_hook_finalizer"),  # asyncio.run
        }
    )
    LOOKED_UP = frozenset({"__code__", "__defaults__", "__kwdefaults__", "cr_code", "cr_frame"})  # for transformers
    TRAINERS = "transfer-descriptors"  # name of a thread

    def __init__(self, sockets: set[str], folder: str) -> None:
        self._sockets = sockets
        folder = re.escape(folder)
        self._files = re.compile(rf"/proc/(\d+|self)/(fd/\d+|sys/.*)|{folder}(/weights)?|\d+-\d+\.(json|safetensors)")
        self.seen: list[str] = []
        self._off = threading.local()
        sys.addaudithook(self._hook)

    @contextmanager
    def off(self) -> Iterator[None]:
        """In this thread, the trainer's or the tester's own doing."""
        self._off.on = True
        try:
            yield
        finally:
            self._off.on = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in self.HARMLESS or getattr(self._off, "on", False) or self._allowed(event, arguments):
            return
        if threading.current_thread().name == self.TRAINERS:
            return
        self.seen.append(f"{event}{str(arguments)[:300]}")
        if event in ("os.system", "subprocess.Popen"):
            raise PermissionError("seen, and that is enough")

    def _allowed(self, event: str, arguments: tuple[Any, ...]) -> bool:
        match event:
            case "object.__getattr__":
                return arguments[1] in self.LOOKED_UP
            case "fcntl.fcntl":
                return arguments[1] == fcntl.F_GET_SEALS
            case "open":
                path, _, flags = arguments
                reads = not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                return reads and (isinstance(path, int) or self._files.fullmatch(path) is not None)
            case "socket.connect":
                return arguments[1] in self._sockets
        return False


class Target:
    """The worker, its trainer, and what must be true of them."""

    def __init__(self, seed: int, way: str, folder: Path) -> None:
        self.seed = seed
        self.stop = STOP
        self.stack = ExitStack()
        self.folder = folder
        self.weights = [tiny(n).state_dict() for n in (1, 2, 3)]
        self.manifest = Manifest.of(self.weights[0])
        self.names = [entry.name for entry in self.manifest.entries]
        self._trainer(WAYS[way])
        self._legacy()
        self.app: Any = None
        self.audit = Audit({self.publisher.endpoint.get("socket", "")}, str(self.folder))
        self.violations: list[str] = []
        self.table: collections.Counter[tuple[str, int]] = collections.Counter()
        self.done = collections.Counter[str]()
        self.answers = {
            verb: {int(status): jsonschema_rs.validator_for(schema) for status, schema in told.items()}
            for verb, told in _answers().items()
        }
        self.traffic = Traffic(seed, self.material)
        self.sent = 0
        self.slowest = 0.0
        self.peak = 0
        self.renew()

    def _trainer(self, config: Any) -> None:
        publisher: Any
        if isinstance(config, DiskConfig):
            publisher = DiskPublisher(config, self.folder)
        else:
            publisher = LivePublisher(config) if config.staging is Staging.live else ArenaPublisher(config)
        self.stack.callback(publisher.close)
        self.publisher = publisher
        shared = {name: tensor.clone() for name, tensor in self.weights[0].items()}
        self.init = publisher.prepare(self.manifest, shared)
        self.live_only = shared if isinstance(publisher, LivePublisher) else None
        self.written: dict[int, tuple[dict[str, Any], str]] = {}  # where versions wait, and their digests
        self.places: list[tuple[dict[str, Any], str]] = []  # arena: slot n holds weights n
        if isinstance(publisher, ArenaPublisher):
            for number in range(2):
                self.places.append(publisher.write(number, self.weights[number], [0] if number else [], True))

    def _legacy(self) -> None:
        self.exporter = self.stack.enter_context(Exporter())
        handles = [self.exporter.add(name, self.weights[2][name])[0] for name in self.names]
        self.exporter.ready()
        fields = next(iter(handles[-1].values()))
        self.memfd = os.pread(fields[2], fields[4] + fields[5], 0)
        entries = self.manifest.entries
        self.material = {
            "manifest": self.manifest.to_json(),
            "init": self.init,
            "handles": [{uuid: list(values) for uuid, values in handle.items()} for handle in handles],
            "names": self.names,
            "dtype_names": [entry.dtype for entry in entries],
            "shapes": [list(entry.shape) for entry in entries],
            "vocabulary": VOCABULARY,
        }

    def place(self, version: int) -> tuple[dict[str, Any], str | None, int]:
        """Where the bytes of a version are, their digest, and which of the weights they are."""
        number = 0 if self.live_only is not None else version % 2
        if self.places:
            return (*self.places[number], number)
        if version not in self.written or self.live_only is not None:  # whose memory says which version it is
            with self.audit.off():
                weights = self.live_only or self.weights[number]
                self.written[version] = self.publisher.write(version, weights, self.written, True)
        return (*self.written[version], number)

    def upcoming(self, status: dict[str, Any]) -> int:
        """The version that a trainer would send now."""
        newest = -1 if status["newest"] is None else status["newest"]
        return newest + 1 if status["target"] is None else status["target"]

    def renew(self) -> None:
        """Another worker, which holds nothing yet."""
        with self.audit.off():
            self.model = tiny(0)
            held = self.model.state_dict(keep_vars=True)
            self.tensors = [held[name] for name in self.names]  # the parameters, whatever memory they view
            for tensor in self.tensors:
                tensor.data.zero_()
            self.worker = Worker.around(self.model, self.publisher.endpoint)
            self.app = make_app(self.worker, TOKEN)
        self.held = self.live()  # what it must go on holding
        self.label: int | None = None
        self.staged: dict[int, str] = {}  # digest of what was staged last, by version

    def live(self) -> str:
        """The digest of what the model samples with."""
        return digest_of(self.tensors)

    # --- one message ---

    async def send(self, sent: Sent) -> tuple[int, Any]:
        """Through the app, as uvicorn calls it."""
        method, path = sent.route
        out: list[dict[str, Any]] = []
        body = [{"type": "http.request", "body": sent.body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return body.pop() if body else {"type": "http.disconnect"}

        async def send(event: dict[str, Any]) -> None:
            out.append(event)

        headers = [(b"authorization", b"Bearer " + TOKEN.encode()), (b"content-type", b"application/json")]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": sent.query, "root_path": "", "headers": headers,
            "server": ("127.0.0.1", 1), "client": ("127.0.0.1", 2), "state": {},
        }  # fmt: skip
        await self.app(scope, receive, send)
        return out[0]["status"], json.loads(out[1]["body"])

    async def warm(self) -> None:
        """Every verb once in both of its forms, so that all is imported that will be."""
        traffic = Traffic(0, self.material)
        traffic.in_parts = traffic.at_once = 0.0
        for one_shot in (True, False):
            for verb in [*SESSION, "completions", *sorted(VERBS, key="withdraw_weights".__eq__)]:  # that one last
                status = self.worker.status({})
                where, digest, _ = self.place(self.upcoming(status))
                message = traffic.valid(verb, status, where, digest, one_shot)
                code, answer = await self.send(Sent(verb, b"", json.dumps(message).encode(), True))
                assert code == 200 or verb in MAY_BE_REFUSED, (verb, code, answer)
            self.renew()
        digest_of(self.tensors, like="sums:")  # a GPU's kind: 48 MiB of torch's own at its first use
        self.audit.seen.clear()

    async def fuzz(self, count: int) -> None:
        """Send `count` messages, one after the other; what goes wrong is in `violations`."""
        for index in range(count):
            if index % LIFE == 0:
                self.renew()
            one_shot = index // LIFE % 2 == 1
            status = self.worker.status({})
            where, digest, number = self.place(self.upcoming(status))
            with self.audit.off():
                sent = self.traffic.next(status, where, digest, one_shot)
            began, resident = time.monotonic(), self.peak_from_here()
            try:
                code, answer = await self.send(sent)
            except Exception as error:
                self.violation(sent, f"the app raised {type(error).__name__}: {error}")
            else:
                self.slowest = max(self.slowest, time.monotonic() - began)
                self.table[sent.verb, code] += 1
                self.check_memory(sent, resident)
                self.check(sent, status, number, code, answer)
            self.sent += 1
            if self.audit.seen:
                self.violation(sent, f"audit events {self.audit.seen[:5]}")
                self.audit.seen.clear()
            if len(self.violations) >= self.stop:
                return

    def violation(self, sent: Sent, what: str) -> None:
        self.violations.append(f"seed {self.seed}, message {self.sent}: {what}\n    {sent}")

    # --- what must hold after every message ---

    def peak_from_here(self) -> int:
        """Bytes that are resident now; the kernel's peak begins anew (proc_pid_clear_refs(5))."""
        with self.audit.off():
            Path("/proc/self/clear_refs").write_text("5")
            return _resident()["VmHWM"]

    def check_memory(self, sent: Sent, before: int) -> None:
        with self.audit.off():
            peak = _resident()["VmHWM"]
        self.peak = max(self.peak, peak)
        fixed, each = MAX_MEMORY
        if peak - before > fixed + each * len(sent.body):
            self.violation(sent, f"{len(sent.body)} bytes have taken {(peak - before) / 2**20:.0f} MiB")

    def check(self, sent: Sent, before: dict[str, Any], number: int, code: int, answer: Any) -> None:
        if code not in self.answers[sent.verb]:
            self.violation(sent, f"status {code} is not documented: {answer}")
        elif not self.answers[sent.verb][code].is_valid(answer):
            self.violation(sent, f"the answer to {code} is not as documented: {answer}")
        elif code != 200 and not answer["error"]["message"]:
            self.violation(sent, f"{code} without a reason")
        after = self.worker.status({})
        self.follow(sent, before, after, code)
        if self.live_only is not None and after["phase"] == "quarantined":  # what it has copied was not as announced
            self.label, self.held = None, self.live()
        if after["version"] != self.label or self.live() != self.held:
            self.violation(sent, f"after {code} the live weights are not those of version {self.label}: {after}")
            self.label, self.held = after["version"], self.live()
        labels = (
            {c["weight_version"] for c in answer["choices"]} if (sent.verb, code) == ("completions", 200) else set()
        )
        if labels - {self.label}:
            self.violation(sent, f"a completion with another version than {self.label}: {answer}")
        if sent.valid and code == 200:
            self.done[f"valid {sent.verb}"] += 1

    def follow(self, sent: Sent, before: dict[str, Any], after: dict[str, Any], code: int) -> None:
        """What an accepted message was allowed to change."""
        if code != 200:
            return
        body = json.loads(sent.body) if sent.body and sent.route[0] == "POST" else {}
        if sent.verb == "withdraw_weights" and self.label is not None and body["version"] >= self.label:
            self.label = None
        info = body if "where" in body else body.get("update_info", {})
        if "epoch" in info:
            if after["version"] == before["version"] and after["target"] is None:
                return  # a repeat of the live version's: nobody looks where it is said to be
            self.staged[info["version"]] = self.found_at(info)
            if body.get("finish"):
                self.flipped(info["version"], self.staged[info["version"]])
        elif sent.verb == "finish_weight_update" and "epoch" in body and after["version"] != before["version"]:
            self.flipped(int(body["weight_version"]), self.staged.get(int(body["weight_version"]), "nothing"))
        elif sent.verb in ("finish_weight_update", "update_weights") and after["version"] != before["version"]:
            whole = all(map(self.is_in_memfd, self.tensors))
            self.flipped(after["version"], self.live() if whole else "a mixture")

    def flipped(self, version: int, held: str) -> None:
        self.done["flips"] += 1
        if self.label is not None and version <= self.label:
            held = f"version {version} after {self.label}"
        self.label, self.held = version, held

    def found_at(self, info: dict[str, Any]) -> str:
        """The digest of what an accepted session update names."""
        if self.places:
            return self.places[info["where"]["slot"]][1]
        number = 0 if self.live_only is not None else info["version"] % 2
        return digest_of(self.weights[number][name] for name in self.names)

    def is_in_memfd(self, tensor: torch.Tensor) -> bool:
        data = as_bytes(tensor).numpy().tobytes()
        return any(self.memfd[at : at + len(data)] == data for at in range(0, len(self.memfd), ALIGN))

    # --- the process ---

    def look(self) -> dict[str, Any]:
        """What the tester wants to know."""
        gc.collect()
        with self.audit.off():
            ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, so that what is left is in use
            memory = _resident()
            descriptors = len(os.listdir("/proc/self/fd"))
        return {
            "sent": self.sent,
            "violations": self.violations,
            "audit": self.audit.seen,
            "table": [[verb, status, count] for (verb, status), count in sorted(self.table.items())],
            "done": self.done,
            "memory": memory["RssAnon"] + memory["RssShmem"],  # without pages of libraries, which come as they are used
            "rss": memory["VmRSS"],
            "peak": self.peak,
            "descriptors": descriptors,
            "slowest": self.slowest,
            "status": self.worker.status({}),
            "live": self.live(),
        }

    def listen(self) -> int:
        """Serve whatever worker there is over real HTTP; the port."""

        async def current(scope: Any, receive: Any, send: Any) -> None:
            await self.app(scope, receive, send)

        listener = serve.listening(WorkerSpec(architecture={"model_type": "qwen3"}, endpoint={}, token=TOKEN))
        server = serve._server(Current(self), TOKEN)
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of bytes that are no HTTP
        server.config.app = current
        threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
        while not server.started:
            time.sleep(0.01)
        return listener.getsockname()[1]


class Current:
    """Whatever worker the target has, for a server that outlives it."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def __getattr__(self, verb: str) -> Any:
        getattr(self._target.worker, verb)
        return lambda message: getattr(self._target.worker, verb)(message)


def _resident() -> dict[str, int]:
    """Bytes of this process, by the kernel's names."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[-1] == "kB"}


def _answers() -> dict[str, dict[str, Any]]:
    """The schema of each status's answer, by verb."""
    told = document(ROUTES)
    found = {}
    for path in told["paths"].values():
        for operation in path.values():
            found[operation["operationId"]] = {
                status: {**response["content"]["application/json"]["schema"], "components": told["components"]}
                for status, response in operation["responses"].items()
                if status != "400"  # uvicorn's, before there is a message
            }
    return found


def main() -> None:
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
    torch.set_num_threads(1)
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    target: Any = None
    for line in sys.stdin:
        job = json.loads(line)
        match job.pop("do"):
            case "start":
                target = Target(job["seed"], job["way"], Path(job["folder"]))
                port = target.listen()
                asyncio.run(target.warm())
                with target.audit.off():
                    holes.plant(job["hole"])
                    target.stop = 1 if job["hole"] else STOP
                answer = {"port": port, "token": TOKEN, "material": target.material}
            case "fuzz":
                asyncio.run(target.fuzz(job["count"]))
                answer = target.look()
            case "place":
                where, digest, _ = target.place(job["version"])
                answer = {"where": where, "digest": digest}
            case "look":
                answer = target.look()
        print(json.dumps(answer), file=report, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
