"""PyTorch's own default device and dtype, for code that makes tensors while a caller has set others."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_defaults() -> Iterator[None]:
    """New tensors lie on the CPU and are float32 in a block of code, or a function that this decorates."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)
