"""How weights move in training: optimisers, learning rate, and the whitening of features."""

from __future__ import annotations

import torch

from titanmem.decoder import Decoder
from titanmem.muon import Muon
from titanmem.train_config import TrainConfig

MATRICES = ("layers.", "memory.lookahead.")
"""Where Muon takes the two-dimensional parameters."""


def optimizers(decoder: Decoder, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers and memory, AdamW for embeddings, head, norms and gates; what is frozen
    stays."""
    named = {name: p for name, p in decoder.named_parameters() if p.requires_grad}
    matrices = [p for name, p in named.items() if p.ndim == 2 and name.startswith(MATRICES)]
    taken = {id(p) for p in matrices}
    # Embeddings that a teacher has given their places are not to be thrown out of them.
    scale = {"embed_tokens.weight": 1.0 if config.teacher else 10.0, "lm_head.weight": 2.0}
    groups = [
        {"params": [p], "lr": config.other_lr * scale.get(name, 1.0)}
        for name, p in named.items()
        if id(p) not in taken
    ]
    muon = Muon(matrices, lr=config.matrix_lr)
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return [muon, adam]


class Whitening:
    """Running mean and covariance of the features of written keys."""

    def __init__(self, features: int) -> None:
        self.mean = torch.zeros(features)
        self.second = torch.eye(features)
        self.seen = 0

    def add(self, features_NF: torch.Tensor) -> None:
        """Take in one batch; young runs forget faster."""
        if len(features_NF) == 0:
            return
        self.seen += 1
        rate = max(0.02, 1.0 / self.seen)
        self.mean.lerp_(features_NF.mean(0), rate)
        self.second.lerp_(features_NF.T @ features_NF / len(features_NF), rate)

    def apply(self, decoder: Decoder) -> None:
        decoder.memory.whiten(self.mean, self.second - self.mean[:, None] * self.mean[None])


def learning_rate(progress: float, step: int, warmup_steps: int) -> float:
    """Share of the base rate: warm up, hold for a fifth of the run, then fall linearly to 2 %."""
    return min(1.0, (step + 1) / warmup_steps) * (1.0 - 0.98 * max(0.0, (progress - 0.2) / 0.8))
