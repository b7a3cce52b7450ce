"""The judge: the sparse rule token by token in float64, straight from the equations, sharing no production code."""

from __future__ import annotations

import numpy as np


def read(written_HD: np.ndarray, columns_K: np.ndarray, values_K: np.ndarray) -> np.ndarray:
    """y = W_3 a."""
    code = np.zeros(len(written_HD))
    code[columns_K] = values_K
    return code @ written_HD.astype(np.float64)


def write(
    written_HD: np.ndarray, columns_NK: np.ndarray, values_NK: np.ndarray, target_ND: np.ndarray,
    weight_N: np.ndarray, alpha: float,
) -> np.ndarray:  # fmt: skip
    """One update: each token takes a gradient step on |W a - v|^2 / 2 with step w, in turn; columns that the update
    selects are first forgotten by alpha, which the errors, taken before, do not see."""
    start = written_HD.astype(np.float64)
    moved = start.copy()
    for columns, values, target, weight in zip(columns_NK, values_NK, target_ND, weight_N, strict=True):
        error = target.astype(np.float64) - read(moved, columns, values)
        for column, value in zip(columns, values, strict=True):
            moved[column] += float(weight) * float(value) * error
    touched = np.unique(columns_NK)
    out = start.copy()
    out[touched] = (1 - alpha) * start[touched] + (moved[touched] - start[touched])
    return out
