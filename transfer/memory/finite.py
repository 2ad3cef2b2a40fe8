"""The search for values that no model should get: NaN, infinities, and numbers that a narrower dtype cannot hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from transfer.agreement.manifest import Manifest


class NotFinite(ValueError):
    """Weights with a value that is not finite were found while they were written; nobody has been told of them.

    `tensor` is the name of the first, if that is known.
    """

    def __init__(self, reason: str = "", tensor: str | None = None) -> None:
        super().__init__(reason)
        self.tensor = tensor


@torch.no_grad()
def not_finite(weights: Mapping[str, torch.Tensor], manifest: Manifest) -> str | None:
    """The first tensor with a value that is NaN, infinite, or beyond the dtype that travels; None if there is none.

    Of entries that are not among `weights` this process holds nothing.
    """
    tensors = [(e, weights[e.name]) for e in manifest.entries if e.name in weights]
    tensors = [(e, torch.view_as_real(t.resolve_conj()) if t.is_complex() else t) for e, t in tensors]
    floats = [(e, t) for e, t in tensors if t.is_floating_point()]
    floats = [(e, t if t.dtype.itemsize > 1 else t.float()) for e, t in floats if t.numel()]
    if not floats:
        return None
    norms = torch.stack(list(torch._foreach_norm([t for _, t in floats]))).double().cpu()  # one pass
    limits = torch.tensor([torch.finfo(e.torch_dtype).max for e, _ in floats], dtype=torch.float64, device="cpu")
    suspects = [floats[i] for i in (~(norms <= limits)).nonzero().flatten().tolist()]  # no value exceeds its norm
    for entry, tensor in suspects:  # NaN, infinite, or so large that the norm overflowed
        if not float(torch.stack(torch.aminmax(tensor)).abs().max()) <= torch.finfo(entry.torch_dtype).max:
            return entry.name
    return None
