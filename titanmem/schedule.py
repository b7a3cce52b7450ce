"""How weights move in training: optimisers, learning rate, and the whitening of features."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from titanmem.decoder import Decoder
from titanmem.muon import Muon
from titanmem.train_config import TrainConfig

MATRICES = ("layers.", "memory.lookahead.", "memory.lookback.")
"""Where Muon takes the two-dimensional parameters."""
TAUGHT_LATER = 0.6
"""Speed of what a teacher has taught, once the rest is trained: at full speed 200 steps undid 600 of lessons."""


def understands(name: str, memory_layer: int) -> bool:
    """Whether a parameter is part of what a teacher's lessons train: embeddings, lower layers, keys and queries."""
    if name.startswith("layers."):
        return int(name.split(".")[1]) < memory_layer
    return name.startswith(
        ("embed_", "memory.lookahead.", "memory.query_", "memory.key_", "memory.around_", "memory.w1")
    )


def optimizers(decoder: Decoder, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers and memory, AdamW for embeddings, head, norms and gates; what is frozen
    stays. Each group says in `later` how fast it goes once a teacher's lessons are no longer all there is."""
    scale = {"embed_tokens.weight": 10.0, "lm_head.weight": 2.0}
    if config.teacher is not None:  # it has given the embeddings their places
        scale["embed_tokens.weight"] = 1.0
    matrices: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for name, parameter in decoder.named_parameters():
        if not parameter.requires_grad:
            continue
        taught = config.teacher is not None and understands(name, decoder.config.memory_layer)
        group = {"params": [parameter], "later": TAUGHT_LATER if taught else 1.0}
        if parameter.ndim == 2 and name.startswith(MATRICES):
            matrices.append({**group, "lr": config.matrix_lr})
        else:
            others.append({**group, "lr": config.other_lr * scale.get(name, 1.0)})
    muon = Muon(_joined(matrices), lr=config.matrix_lr)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return [muon, adam]


def _joined(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of one speed as one: Muon works on stacks of matrices."""
    joined: dict[float, dict[str, Any]] = {}
    for group in groups:
        joined.setdefault(group["later"], {**group, "params": []})["params"] += group["params"]
    return list(joined.values())


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
