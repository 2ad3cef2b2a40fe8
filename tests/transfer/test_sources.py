import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from worker_process import PlainModel

from transfer.agreement.manifest import Manifest
from transfer.memory.digest import digest_of
from transfer.trainer.sources import full_weights

TRAINER = """
import json, os, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from worker_process import PlainModel
from transfer import make_receiver, make_transfer
from transfer.config import IpcConfig, SenderConfig
from transfer.memory.digest import digest_of
from transfer.agreement.manifest import Manifest
from transfer.trainer.senders.direct import DirectSender
from transfer.trainer.sources import full_weights
from pathlib import Path

torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=int(sys.argv[2]), world_size=2)
module = fully_shard(PlainModel(0), mesh=init_device_mesh("cpu", (2,)))
told = {}
with make_transfer(IpcConfig(sender=SenderConfig(timeout_s=5.0)), Path(sys.argv[1])) as transfer:
    received = PlainModel(9)
    receiver = make_receiver(transfer.endpoint, received)
    for version in range(3):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1.0 if version else 0.0)
        weights = full_weights(module.state_dict(keep_vars=True))  # by both ranks
        if dist.get_rank() == 0:
            if version == 0:
                transfer.open(weights, [DirectSender(receiver, "worker 0")])
            transfer.push(weights)
            state = received.state_dict()
            told[version] = digest_of(state[entry.name] for entry in Manifest.of(state).entries)
    receiver.close()
dist.barrier()
if dist.get_rank() == 0:
    print(json.dumps(told))
dist.destroy_process_group()
"""


def test_shards_of_fsdp_are_gathered_and_arrive_whole(tmp_path):
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", TRAINER, str(tmp_path)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank)], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=100)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    whole = PlainModel(0)
    for version, digest in json.loads(said[0].splitlines()[-1]).items():
        if version != "0":
            with torch.no_grad():
                for parameter in whole.parameters():
                    parameter.add_(1.0)
        state = whole.state_dict()
        assert digest == digest_of(state[entry.name] for entry in Manifest.of(state).entries)


def test_plain_tensors_are_themselves_and_tied_ones_stay_tied():
    tensor, other = torch.ones(3), torch.zeros(2)
    weights = full_weights({"a": tensor, "b": tensor, "c": other})
    assert weights["a"] is tensor and weights["b"] is tensor and weights["c"] is other
