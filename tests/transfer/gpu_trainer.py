"""A trainer as a process of its own, to be killed or to be given other settings than pytest has:

    RLHF_WORKER_TOKEN=... python gpu_trainer.py FOLDER STAGING TAKE DEVICE MIB PUSHES URL...

It pushes to the workers at these addresses: a line of JSON on stdout for each push.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from transfer import make_transfer
from transfer.agreement.journal import Journal
from transfer.agreement.wire import TOKEN_VARIABLE
from transfer.config import HttpSenderConfig, InFlight, IpcConfig, Staging, Take
from transfer.memory.digest import digest_of
from transfer.trainer.senders.http import HttpSender

TENSORS = 8
SENDER = HttpSenderConfig(timeout_s=20.0)


def weights_of(mib: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """So many MiB of bfloat16 in a few tensors, the last one of an odd size."""
    size = mib * 2**20 // 2 // TENSORS
    lengths = [size] * (TENSORS - 1) + [size - 3]
    return {
        f"w{index}": torch.nn.Parameter(torch.ones(length, device=device, dtype=torch.bfloat16))
        for index, length in enumerate(lengths)
    }


def train(weights: dict[str, torch.Tensor]) -> str:
    """Change every value; the digest."""
    with torch.no_grad():
        for tensor in weights.values():
            tensor.copy_((tensor + 1) % 256)
    return digest_of(weights.values())


def main() -> None:
    """Push, and report each push."""
    folder, staging, take, device, mib, pushes, *urls = sys.argv[1:]
    config = IpcConfig(sender=SENDER, staging=Staging(staging), take=Take(take))
    weights = weights_of(int(mib), device)
    with ExitStack() as stack:
        journal = stack.enter_context(closing(Journal(Path(folder) / "journal" / f"trainer-{os.getpid()}.jsonl")))
        senders = [HttpSender(url, os.environ[TOKEN_VARIABLE], f"worker {i}", 20.0) for i, url in enumerate(urls)]
        transfer = stack.enter_context(make_transfer(config, Path(folder), InFlight.wait, journal))
        transfer.open(weights, senders)
        for _ in range(int(pushes)):
            transfer.withdraw()
            digest = train(weights)
            version = transfer.push(weights)
            print(json.dumps({"version": version, "digest": digest}), flush=True)


if __name__ == "__main__":
    main()
