"""What the tests of the one-shot API share: weights of many kinds, and a model that remembers what it was given."""

import base64
import hashlib
import pickle

import torch

from transfer import IPCWeightTransferEngine
from transfer.engine import ipc

torch.set_num_threads(1)

DEADLINE_S = 60.0


def digest(tensor):
    """dtype, shape and a hash of the elements' bytes."""
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(data).hexdigest()]


def digests(weights):
    return {name: digest(tensor) for name, tensor in weights.items()}


def weights(device="cpu"):
    shared = torch.randn(4, 6)
    tensors = {
        "plain": torch.randn(300, 7),
        "half": torch.randn(5, 5).bfloat16(),
        "odd": torch.arange(13, dtype=torch.uint8),
        "after odd": torch.randn(3, dtype=torch.float64),
        "fp8": torch.randn(9).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False, True]),
        "int64": torch.tensor([2**62, -1]),
        "scalar": torch.tensor(0.5),
        "empty": torch.empty(0, 3),
        "transposed": torch.randn(6, 4).t(),
        "tied": shared,
        "tied too": shared,
        "part": torch.randn(10, 10)[3:7, 2:],
    }
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    return {**moved, "leaf": torch.nn.Parameter(torch.randn(4, device=device))}


def message(exporter, tensors):
    """An update_info as the ray transport sends it."""
    return ipc._messages(tensors.items(), exporter, 1)[0]


class Loaded:
    """What a worker's model does with weights: copies them, and remembers how they came."""

    def __init__(self):
        self.weights = {}
        self.calls = []

    def load_weights(self, pairs):
        pairs = list(pairs)
        self.calls.append(len(pairs))
        self.weights.update({name: tensor.clone() for name, tensor in pairs})


def receive(update, load_weights):
    engine = IPCWeightTransferEngine(None, None)
    engine.receive_weights(engine.parse_update_info(update), load_weights)


def pickled(handles, protocol=4):
    return base64.b64encode(pickle.dumps(handles, protocol)).decode()
