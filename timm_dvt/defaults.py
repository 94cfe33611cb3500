"""PyTorch's own default device and dtype, for code that makes tensors while a caller has set others."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def torch_defaults() -> Iterator[None]:
    """New tensors lie on the CPU and are float32 in a block of code, or a function that this decorates."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        # Within a device each call of torch goes through Python, which takes as long as the work on small tensors.
        here: Any = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
        with here:
            yield
    finally:
        torch.set_default_dtype(before)
