"""Weights on the stand-in hub as published, backbones in timm's repos and denoisers in the authors'; and an image."""

from pathlib import Path

import safetensors.torch
import timm
import torch

import timm_dvt
from tests.helpers import reference
from timm_dvt.registry import VARIANTS
from timm_dvt.variants import DVT_REPO

BACKBONE = "test_vit.r160_in1k"  # timm's smallest


def publish_backbone(hub, backbone: str, **kwargs) -> dict:
    """Put random weights of a backbone on the stand-in hub, as timm publishes them; returns the state dict."""
    state = timm.create_model(backbone, **kwargs).state_dict()
    repo = hub.folder / timm.get_pretrained_cfg(backbone).hf_hub_id
    repo.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(state, repo / "model.safetensors")
    return state


def publish(hub, filename: str, content: object) -> Path:
    """Put a checkpoint into the authors' repo."""
    path = hub.folder / DVT_REPO / filename
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def publish_tiny(hub) -> str:
    """Put a variant of the smallest ViT on the stand-in hub, layout and all; returns its name."""
    name = f"{BACKBONE}_dvt_small"
    filename = f"voc_denoised/{BACKBONE}.pth"
    publish_backbone(hub, BACKBONE)
    publish(hub, filename, {"denoiser": reference.published_state(64, 6), "step": 1})
    if name not in VARIANTS:
        register = {"resolution": 96, "hub_id": DVT_REPO, "hub_file": filename}
        assert timm_dvt.register(BACKBONE, "dvt_small", **register) == name
    return name


def images_for(model) -> torch.Tensor:
    """A random image of 3 x 4 patches."""
    patch = model.patch_embed.patch_size[0]
    return torch.randn(1, 3, 3 * patch, 4 * patch)
