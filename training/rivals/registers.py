"""Test-time registers (Jiang et al., NeurIPS 2025, arXiv 2506.08010): outliers moved to a token that nobody reads.

In some ViTs a few neurons of the MLPs write tokens many times as long as the others ("outliers") on patches of little
content. One more token, zero at first, is put beside the class token, and of each such neuron n, in each of these MLPs,

    h[register, n] = max over tokens of h[., n],   h[patches, n] = 0        h: after the activation

Theirs (their code): outliers are tokens longer than a number chosen for each model (150 for DINOv2-L, 30 for CLIP)
after one of the last blocks; the neurons are those of the largest mean |h| on outliers, without those that are not
below 0.5 on half of an image's tokens, in the blocks up to where outliers appear, their number chosen for each model
(45 in their list for DINOv2-L, 10 for CLIP); the largest by magnitude, of the class token too, goes to the register,
and is one for all neurons of a block.

Ours: an outlier is `LONG` times as long as the median patch token of its image, before the final norm, and outliers
appear in the first block after which they are `LONG` times as long as the other tokens are on average; of the `MOST`
first neurons those are taken whose mean |h| is `SPARSE` times what it is on other patches, and which add no less than
`WEAK` of the longest vector that one of them adds to an outlier. Each neuron has a largest of its own, as a comment in
their code says it: by the code, one that says little is as loud on the register as the loudest.

This changes the inside of the backbone, so no folder of timm's holds it: it is put into a model each time.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from timm_dvt.errors import UserError
from training.rivals.sample import Sample

LONG = 3.0
MOST = 45
SPARSE = 5.0
WEAK = 0.05
Neuron = tuple[int, int]  # block, channel of its MLP


class NotForThisModel(UserError):
    """The model has registers already, is of a class without, or has no outliers."""


class ShiftToRegister(nn.Module):
    """The second layer of an MLP, which is given what some neurons say by the register instead of the patches."""

    def __init__(self, layer: nn.Module, neurons: Sequence[int], prefix: int) -> None:
        """
        Args:
            neurons: channels of the layer's input.
            prefix: tokens ahead of the patches, the last of which is the register.
        """
        super().__init__()
        self.layer, self.prefix = layer, prefix
        self.neurons: Tensor
        # Of the state dict, by which features in a cache are told from those of another choice.
        self.register_buffer("neurons", torch.tensor(neurons))

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, prefix + N, H) to (B, prefix + N, C)."""
        chosen = hidden[..., self.neurons]
        hidden = hidden.clone()
        hidden[:, self.prefix :, self.neurons] = 0
        hidden[:, self.prefix - 1, self.neurons] = chosen.gather(1, chosen.abs().argmax(1, keepdim=True))[:, 0]
        return self.layer(hidden)


def add_register(model: Any, neurons: Iterable[Neuron]) -> None:
    """Give a VisionTransformer the token and shift these neurons to it, in place. Raises NotForThisModel."""
    check(model)
    prefix, weight = model.num_prefix_tokens, model.patch_embed.proj.weight
    zero = weight.new_zeros(1, 1, model.embed_dim)
    if model.pos_embed is not None and not model.no_embed_class:  # it has a row for each token: none for this one
        rows = torch.cat([model.pos_embed[:, :prefix], zero, model.pos_embed[:, prefix:]], dim=1)
        model.pos_embed = nn.Parameter(rows.detach(), requires_grad=False)
    model.reg_token = nn.Parameter(zero, requires_grad=False)
    model.num_reg_tokens, model.num_prefix_tokens = 1, prefix + 1
    of_block: dict[int, list[int]] = {}
    for block, neuron in neurons:
        of_block.setdefault(block, []).append(neuron)
    for block, chosen in of_block.items():
        mlp = model.blocks[block].mlp
        mlp.fc2 = ShiftToRegister(mlp.fc2, sorted(chosen), prefix + 1).to(weight.device)


def check(model: Any) -> None:
    """Raise NotForThisModel for one that registers cannot be added to."""
    if not isinstance(model, VisionTransformer) or not all(hasattr(block.mlp, "fc2") for block in model.blocks):
        raise NotForThisModel(f"a {type(model).__name__} is no VisionTransformer with MLPs")
    if model.reg_token is not None:
        raise NotForThisModel(f"the model was trained with {model.num_reg_tokens} registers")


@torch.no_grad()
def register_neurons(model: Any, batches: Iterable[Tensor], most: int = MOST) -> list[Neuron]:
    """The neurons that write outliers, those that say most there first.

    Args:
        model: a VisionTransformer in eval mode.
        batches: images (B, 3, h, w), normalized.

    Raises:
        NotForThisModel: there are no outliers.
    """
    prefix, depth = model.num_prefix_tokens, len(model.blocks)
    hidden: dict[int, Tensor] = {}
    lengths: dict[int, Tensor] = {}
    hooks = []
    for place, block in enumerate(model.blocks):
        hooks += [
            block.mlp.fc2.register_forward_pre_hook(
                lambda _, inputs, place=place: hidden.update({place: inputs[0][:, prefix:].abs()})
            ),
            block.register_forward_hook(
                lambda _, inputs, output, place=place: lengths.update({place: output[:, prefix:].norm(dim=-1)})
            ),
        ]
    # Sums over outliers and over other patches: of |h| (H,), and of lengths, by block.
    says: list[list[Any]] = [[0.0, 0.0] for _ in range(depth)]
    long: list[list[float]] = [[0.0, 0.0] for _ in range(depth)]
    counts = [0, 0]
    try:
        for images in batches:
            model.forward_features(images)
            last = lengths[depth - 1]
            outlier = last > LONG * last.median(1, keepdim=True).values
            for kind, mask in enumerate((outlier, ~outlier)):
                counts[kind] += int(mask.sum())
                for place in range(depth):
                    says[place][kind] = says[place][kind] + hidden[place][mask].double().sum(0)
                    long[place][kind] += float(lengths[place][mask].double().sum())
    finally:
        for hook in hooks:
            hook.remove()
    if not counts[0]:
        raise NotForThisModel(f"none of {counts[1]} patch tokens is {LONG:g} times as long as its image's median")
    ratio = counts[1] / counts[0]
    appear = next(place for place, (at, other) in enumerate(long) if at * ratio >= LONG * other or place == depth - 1)
    at = torch.stack([kinds[0] for kinds in says[: appear + 1]]) / counts[0]
    other = torch.stack([kinds[1] for kinds in says[: appear + 1]]) / counts[1]
    added = at * torch.stack([_written(block) for block in model.blocks[: appear + 1]]).to(at)
    first = at.flatten().argsort(descending=True)[:most].tolist()
    pairs = [(place // at.shape[1], place % at.shape[1]) for place in first]
    sparse = [pair for pair in pairs if at[pair] >= SPARSE * other[pair]]
    longest = max((float(added[pair]) for pair in sparse), default=0.0)
    return [pair for pair in sparse if added[pair] >= WEAK * longest]


def _written(block: Any) -> Tensor:
    """(H,) length of what each neuron of a block's MLP adds to a token where it is 1."""
    weight = block.mlp.fc2.weight
    scale = getattr(getattr(block, "ls2", None), "gamma", weight.new_ones(1))  # LayerScale's
    return (weight * scale[:, None]).norm(dim=0)


def find(model: Any, sample: Sample) -> list[Neuron]:
    """The neurons of a backbone for `add_register`. Raises NotForThisModel."""
    check(model)
    mean, std = sample.reader.mean, sample.reader.std
    weight = model.patch_embed.proj.weight
    normalized = (((images.to(weight.device) - mean) / std).to(weight.dtype) for images in sample.batches())
    neurons = register_neurons(model.eval(), normalized)
    if not neurons:
        raise NotForThisModel("no neuron says more on outliers than elsewhere")
    return neurons
