"""Without a GPU the Triton kernels run in Triton's interpreter, which is chosen once, when Triton is first imported."""

from __future__ import annotations

import os
import sys

import torch

if not torch.cuda.is_available():
    early = "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
    assert not early, "a test module imported triton before tests/kernels could choose its interpreter"
    os.environ["TRITON_INTERPRET"] = "1"
