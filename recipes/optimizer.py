"""The recipe's optimizer: Muon for weight matrices, AdamW for everything else."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of a polynomial that maps singular values to about 1
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrices (N, rows, columns) with singular values near 1, by Newton-Schulz iteration in the given dtype.

    Source: K. Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(dtype)
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon, as `torch.optim.Muon`, with a choice of dtype and one update for all matrices of a shape.

    torch's iterates in bf16, which without bf16 units takes five times as long as the rest of a step, and launches many
    small kernels, which a GPU waits for. Updates are scaled to the size of AdamW's (Moonlight, arXiv 2502.16982).

    Args:
        dtype: of the Newton-Schulz iteration.
    """

    MOMENTUM = 0.95

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float, dtype: torch.dtype):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for matrices in by_shape.values():
                self._update(matrices, group["lr"], group["weight_decay"])

    def _update(self, matrices: list[Tensor], lr: float, weight_decay: float) -> None:
        """One step for matrices of the same shape."""
        gradients = [matrix.grad for matrix in matrices]
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        momenta = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - self.MOMENTUM)
        updates = torch.stack(torch._foreach_lerp(gradients, momenta, self.MOMENTUM))  # Nesterov momentum
        directions = orthogonalize(updates, self.dtype).to(updates.dtype)
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        torch._foreach_add_(matrices, directions.unbind(), alpha=-lr * 0.2 * max(matrices[0].shape) ** 0.5)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the weight matrices; AdamW for the embeddings, the patch projection and all vectors.

    Both have the same learning rate.

    Args:
        dtype: of Muon's iteration; weights and moments stay float32.
    """

    def __init__(self, model: nn.Module, learning_rate: float, weight_decay: float, dtype: torch.dtype):
        tables = [model.get_input_embeddings().weight, model.vision_model.patch_embedding.weight]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [p for p in trained if p.ndim == 2 and not any(p is table for table in tables)]
        chosen = {id(parameter) for parameter in matrices}
        others = [parameter for parameter in trained if id(parameter) not in chosen]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(Muon(matrices, learning_rate, weight_decay, dtype))
        if others:
            self.parts.append(torch.optim.AdamW(others, learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """Schedulers change `param_groups`, so these must be the same objects as the parts' own."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()
