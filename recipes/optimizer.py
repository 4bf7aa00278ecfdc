"""The recipe's optimizer: Muon for weight matrices, AdamW for everything else."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of the odd polynomial that takes singular values of 0 to 1 close to 1
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix with all its singular values near 1, by Newton-Schulz iteration in the given dtype.

    Source: K. Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.to(dtype)
    is_tall = x.shape[0] > x.shape[1]
    x = x.mT if is_tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalized momentum, as `torch.optim.Muon`, which knows bf16 alone.

    Where a processor has no units for bf16, its iteration takes five times as long as the whole rest of a step. Steps
    are scaled to the size of AdamW's (Moonlight, arXiv 2502.16982).

    Args:
        dtype: of the iteration.
    """

    MOMENTUM = 0.95

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float, dtype: torch.dtype):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._update(matrix, group["lr"], group["weight_decay"])

    def _update(self, matrix: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        momentum = state["momentum_buffer"]
        momentum.lerp_(matrix.grad, 1 - self.MOMENTUM)
        direction = orthogonalize(matrix.grad.lerp(momentum, self.MOMENTUM), self.dtype)
        matrix.mul_(1 - lr * weight_decay)
        matrix.add_(direction, alpha=-lr * 0.2 * max(matrix.shape) ** 0.5)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the weight matrices, AdamW for the embeddings, the patch projection and all vectors.

    One learning rate serves both.

    Args:
        dtype: of Muon's arithmetic; weights and moments stay float32.
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
        """A scheduler sets the learning rates in `param_groups`: they must be the parts' own."""
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
