"""Stage 1 of one image of many: its seed, what of it is kept, and what may go wrong without stopping the others."""

import hashlib

from torch import Tensor

from training.common.images import ImageError
from training.pairs.folder import ValueTooLarge
from training.stage1.conditioning import IllConditioned
from training.stage1.decompose import Decomposition, NonFiniteFeatures

# What costs one image its pair, while the others go on.
IMAGE_ERRORS = (ImageError, NonFiniteFeatures, IllConditioned, ValueTooLarge)


def image_seed(seed: int, digest: str) -> int:
    """An image's own seed, from the run's and its file's sha256: the same in any order, on any process."""
    return int.from_bytes(hashlib.sha256(f"{seed} {digest}".encode()).digest()[:7], "big")


def pair_maps(parts: Decomposition) -> dict[str, Tensor]:
    """The maps that a pair keeps; not the residual: with the linear solver it is raw - clean - artifacts."""
    return {"raw": parts.raw, "clean": parts.semantics, "artifacts": parts.artifacts}
