"""Conversion of a published `.pth` to a folder of safetensors, config.json and a model card."""

import os
from pathlib import Path
from typing import Any

import timm

from timm_dvt.errors import UserError
from timm_dvt.loading import did_you_mean
from timm_dvt.publish.cards import card
from timm_dvt.registry import VARIANTS
from timm_dvt.timm_private import hf_split
from timm_dvt.variants import Variant
from timm_dvt.weights.fetching import WEIGHTS_NAME, fetch
from timm_dvt.weights.files import folder_path, write_whole
from timm_dvt.weights.saving import save_plain, save_pretrained

WRITTEN = ("README.md", "config.json", WEIGHTS_NAME)


def convert(source: str | None, model: str, out: str | os.PathLike, denoiser_only: bool = False) -> Path:
    """Write a variant, with the weights of `source`, as a folder that timm loads; returns the folder.

    Transformers loads a whole one too.

    Args:
        source: a `.pth` or safetensors file, a folder of ours, a file of the Hub (`ORG/REPO/FILE`, `hf-hub:ORG/REPO`,
            `hf-hub:ORG/REPO@REVISION/FILE`), or None for where the variant's weights are published.
        model: the variant's name.
        out: a folder, made if it does not exist.
        denoiser_only: leave out the backbone's weights, which are then fetched from its own repo on loading.

    Raises:
        UserError: a name cannot be used, or the folder, one of another model say. WeightsNotFoundError,
            CheckpointError: as on loading.
    """
    variant = known_variant(model)
    if denoiser_only and variant.distilled:
        raise UserError(f"{model} is a whole ViT without a denoiser; leave --denoiser-only out")
    out = folder_path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"cannot write {out}: it is a file, and a folder is needed")
    readme = out / "README.md"
    again = readme.is_file() and f"\n# {model}\n" in readme.read_text(encoding="utf-8", errors="replace")
    if not again and (there := [name for name in WRITTEN if (out / name).exists()]):
        raise UserError(f"{out} holds {', '.join(there)}, not written by convert for {model}; name another folder")
    file = None if source is None else find(source)
    # Of a training or a calibration, say: what is published for these variants, pickles, is not written by any of ours.
    own = file is not None and (os.path.isdir(file) or file.endswith(".safetensors"))
    overlay: Any = {} if file is None else {"pretrained_cfg_overlay": {"file": file}}
    network = timm.create_model(model, pretrained=True, **overlay)
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = str(card(variant, denoiser_only=denoiser_only, model=network, own=own))
        write_whole(readme, lambda path: path.write_text(text, encoding="utf-8"))  # first: by it the folder is known
        if variant.distilled:
            save_plain(network, out, variant.backbone)
        else:
            save_pretrained(network, out, denoiser_only)
    except OSError as e:
        raise UserError(f"cannot write {out}: {e.strerror or e}") from e
    return out


def known_variant(name: str) -> Variant:
    """The variant of that name. Raises UserError for one that is not there, or has no weights."""
    if name not in VARIANTS:
        raise UserError(
            f"{name!r} is not a variant; timm-dvt list prints the names there are{did_you_mean(name, list(VARIANTS))}"
        )
    return VARIANTS[name]


def find(source: str) -> str:
    """The path of a file or folder on this machine, or of a file of the Hub once it is fetched.

    Raises:
        UserError: it is neither. WeightsNotFoundError: it cannot be fetched.
    """
    if os.path.exists(source):
        return source
    name = source.removeprefix("hf-hub:")
    parts = name.split("/")
    if name == source and (len(parts) < 3 or source.startswith((".", "/", "~")) or not all(parts)):
        raise UserError(
            f"{source}: no such file; a file of the Hub is named ORG/REPO/FILE or hf-hub:ORG/REPO, as in "
            "jjiaweiyang/DVT/voc_denoised/vit_base_patch14_dinov2.lvd142m.pth"
        )
    if len(parts) < 2 or not all(parts) or ".." in parts or name.count("@") > 1:
        raise UserError(f"{source}: a file of the Hub is named hf-hub:ORG/REPO, hf-hub:ORG/REPO@REVISION/FILE")
    repo, revision = hf_split("/".join(parts[:2]))
    return fetch(repo, "/".join(parts[2:]) or WEIGHTS_NAME, revision)
