"""Two ranks of a trainer that broadcast their rows, in a process without CUDA from which they can be forked:

    python gpu_ranks.py FOLDER DEVICE LIBRARY

On `cuda` each has a GPU, and the worker, by `nccl`, the one behind theirs, by `gloo` that of the first rank. A worker
that is killed while it receives, and a rank that is while it sends, NCCL does not notice: a push must end soon all the
same. The last line of stdout is `ok`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rank_processes import ITSELF, Decoder, Trainer, Worker, trained, trainer

from transfer.agreement.manifest import ALIGNMENT, Manifest
from transfer.config import CollectiveConfig, Library, SenderConfig
from transfer.memory.digest import digest_of

SENDER = SenderConfig(timeout_s=60.0)
SOON_S = 30.0


def expected(steps: int, on_gpus: bool) -> str:
    """The digest of a whole Decoder after so many steps, as a worker there finds it."""
    module = Decoder(seed=1, tied=False)
    trained(module, steps)
    weights = module.state_dict()
    entries = Manifest.of(weights).entries
    return digest_of([weights[entry.name] for entry in entries], "sums:" if on_gpus else None)


def main() -> None:
    """Push, and let a worker and a rank be killed."""
    folder, device, library = Path(sys.argv[1]), sys.argv[2], Library(sys.argv[3])
    on_gpus = device == "cuda"
    config = CollectiveConfig(sender=SENDER, library=library)
    with trainer(2, folder, device=device, seed=1, tied=False) as ours:
        endpoint = ours.call("make", config=config)[0]
        manifest = Manifest.of(Decoder(seed=0, tied=False).state_dict())
        with Worker(
            endpoint, folder, manifest, f"cuda:{2 * (library is Library.nccl)}" if on_gpus else "cpu"
        ) as worker:
            ours.call("open", url=worker.url)
            for steps in range(3):
                ours.call("buckets_of", size=2**20 if steps == 0 else ALIGNMENT)
                assert {each[0] for each in ours.call("push")} == {steps}
                assert worker.serves() == (steps, expected(steps, on_gpus)), steps
                if steps < 2:
                    ours.call("train")
            assert ours.outcomes("recover", of=[0], url=worker.restart()) == [("gives", True)]
            assert worker.serves() == (2, expected(2, on_gpus))
            killed_while_it_receives(ours, worker)
            version, digest = worker.serves()
            assert version > 2 and digest == expected(3, on_gpus)
            a_rank_is_killed(ours)
            assert worker.serves() == (version, digest)
    print("ok")


def killed_while_it_receives(ours: Trainer, worker: Worker) -> None:
    """The push fails soon, and the next one succeeds."""
    ours.call("harm", rank=1, during="broadcast", pid=worker.process.pid)
    began = time.monotonic()
    assert all("worker 0" in error for error in ours.errors("push"))
    assert time.monotonic() - began < SOON_S
    ours.call("train")
    ours.outcomes("recover", of=[0], url=worker.restart())
    ours.call("push")


def a_rank_is_killed(ours: Trainer) -> None:
    """In the middle of a broadcast: the first rank's push ends soon."""
    ours.call("harm", rank=1, during="broadcast", pid=ITSELF)
    began = time.monotonic()
    for rank in range(2):
        ours.begin("push", rank)
    kind, said = ours.outcome(0)
    assert kind == "raises" and "have lost each other" in said, said
    assert time.monotonic() - began < SOON_S


if __name__ == "__main__":
    main()
