"""What a denoiser did to images that it has not seen: numbers, pictures, a card and a page in its folder."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.models import get_pretrained_cfg

from timm_dvt.bars import tqdm
from timm_dvt.errors import ImageError, UserError
from timm_dvt.image_files import Source, load_image
from timm_dvt.publish.cards import LIBRARY, TAGS
from timm_dvt.shared_folder import write_atomically
from timm_dvt.version import REPOSITORY
from timm_dvt.viewer.colors import map_correlation
from timm_dvt.viewer.panel import Shown, draw
from training.evaluate.features.extractor import Extractor
from training.evaluate.position.blank import COLORS, spread, token_reader
from training.evaluate.position.share import PositionStatistics
from training.evaluate.segmentation.one_sided import color_groups, counts, wrong_shares
from training.figures.page import Picture, Section, Table, Text, page

PICTURES = 4
WORDS = {
    "share": "variance that position explains, %",
    "zero": "correlation with the map of a blank image",
    "blank": "pattern in images of one color, % of that with the denoiser off",
    "wrong": "patches that get the wrong label where each of two groups by color is labeled on one side, %",
}
GRAY = "gray"  # of COLORS, the blank image that is shown
MEANING = (
    "What depends on the place of a patch and not on the image is noise, so all are better the nearer they are to 0. "
    "Measured on {count} images that were held out."
)
FEW = 20  # images, below which the numbers say little
TOO_FEW = (
    " So few tell little: chance moves the numbers, also below 0, and what all of them show at a place counts too."
)


def before_after(
    model: torch.nn.Module,
    sources: Sequence[Source],
    folder: Path,
    name: str,
    facts: Mapping[str, str],
    pretrained: bool = True,
) -> None:
    """Write README.md and page.html into the folder of a trained denoiser.

    Args:
        model: with its denoiser, on its device, in eval mode.
        sources: images held out, two or more; those that cannot be read are left out.
        folder: where to write. name: what it is called on the pages.
        facts: what it was trained on, in words.
        pretrained: whether the backbone's weights are those that its name stands for, or random ones.
    """
    extractor = Extractor(model)
    numbers, pictures, count = measure(extractor, sources)
    meaning = MEANING.format(count=count) + (TOO_FEW if count < FEW else "") + worse(numbers)
    load = f'import timm, timm_dvt\n\nmodel = timm.create_model("local-dir:{name}", pretrained=True).eval()\n'
    code = load + "tokens = model.forward_features(images)   # (B, prefix + H*W, C), patch tokens denoised\n"
    code += "model.set_denoise(False)                 # the original output again, bit for bit\n"
    said = [key for key in WORDS if key in numbers["raw"]]
    rows = [[WORDS[key], *(f"{numbers[state][key]:.3g}" for state in ("raw", "denoised"))] for key in said]
    title = f"A denoiser of {getattr(model, 'backbone_name', '') or type(model).__name__}"
    title += "" if pretrained else " with random weights"
    lead = "Its features with the denoiser off and on, on images that it was not trained on."
    sections = [
        Section("In numbers", [Table(["", "off", "on"], rows), Text(meaning)]),
        Section("In pictures", [Picture(png, caption) for png, caption in pictures]),
        Section("How it was made", [Table(["", ""], list(facts.items()), words=2)]),
        Section("How to use it", [Text(code, code=True)]),
    ]
    write_atomically(folder / "page.html", page(title, lead, sections))
    table = "\n".join(f"| {' | '.join(row)} |" for row in (["", "off", "on"], ["---"] * 3, *rows))
    made = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    tags = "".join(f"- {tag}\n" for tag in TAGS)
    data = f"---\nlibrary_name: {LIBRARY}\n{license_of(model)}{base_of(model) if pretrained else ''}tags:\n{tags}---\n"
    card = f"{data}# {title}\n\n{lead}\n\n{table}\n\n{meaning}\n\n{made}\n\n"
    card += f"```sh\npip install git+{REPOSITORY}\n```\n\n```python\n{code}```\n"
    write_atomically(folder / "README.md", card.encode(errors="replace"))


def base_of(model: torch.nn.Module) -> str:
    """The line of a card's metadata that says where a backbone's own weights are; none where they have no repo."""
    known = get_pretrained_cfg(str(getattr(model, "backbone_name", "")))
    return f"base_model: {known.hf_hub_id}\nbase_model_relation: adapter\n" if known and known.hf_hub_id else ""


def license_of(model: torch.nn.Module) -> str:
    """The lines of a card's metadata that say the license of a backbone's weights; none where timm does not know it."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("license")
    if not name:
        return ""
    # What is nobody else's license has no id on the Hub, but a name.
    return f"license: other\nlicense_name: {name}\n" if name.endswith("-license") else f"license: {name}\n"


def measure(
    extractor: Extractor, sources: Sequence[Source]
) -> tuple[dict[str, dict[str, float]], list[tuple[bytes, str]], int]:
    """The numbers of `WORDS` by state, pictures of some images and of a gray one with names, and how many there were.

    Raises:
        ValueError: fewer than two images can be read.
    """
    size, device = extractor.reader.input_size, extractor.reader.device
    zero = extractor.backbone(extractor.reader.mean.expand(1, 3, size, size))["raw"][0].flatten(0, 1)
    statistics = {"raw": PositionStatistics(), "denoised": PositionStatistics()}
    wrong: dict[str, list[float]] = {state: [] for state in statistics}
    pictures: list[tuple[bytes, str]] = []
    for source in tqdm(sources, desc="held out", unit="image", leave=False):
        try:
            image = extractor.resize(load_image(source.path))
        except ImageError as error:
            tqdm.write(f"left out {source.shown}: {error}")
            continue
        raw = extractor.backbone(image[None].to(device))["raw"]
        denoised = extractor.denoise(raw, image[None])
        groups = color_groups(image, extractor.reader.grid)
        for state, maps in (("raw", raw.cpu()), ("denoised", denoised.cpu())):
            statistics[state].add(maps)
            if counts(groups):
                wrong[state] += wrong_shares(maps[0], groups)
        if len(pictures) < PICTURES:
            pictures.append((draw_png(image, raw[0], denoised[0]), Path(source.shown).name))
    if statistics["raw"].count < 2:
        raise UserError("fewer than two of the images held out can be read")
    numbers = {
        state: {"share": 100 * sums.share(), "zero": map_correlation(zero.cpu().numpy(), sums.mean_map().numpy())}
        for state, sums in statistics.items()
    }
    for state, shares in wrong.items():
        if shares:
            numbers[state]["wrong"] = 100 * sum(shares) / len(shares)
    patterns, picture = blanks(extractor)
    for state, pattern in patterns.items():
        numbers[state]["blank"] = pattern
    return numbers, [*pictures, picture], statistics["raw"].count


def blanks(extractor: Extractor) -> tuple[dict[str, float], tuple[bytes, str]]:
    """The pattern left in images of one color by state, in percent of the raw one, and a picture of a gray one."""
    size = extractor.reader.input_size
    read = token_reader(extractor, (size, size))
    squares: dict[str, list[float]] = {"raw": [], "denoised": []}
    for name, color in COLORS.items():
        image = torch.tensor(color).view(3, 1, 1).expand(3, size, size)
        tokens = read(image)
        for state, values in squares.items():
            values.append(spread(tokens[state]) ** 2)
        if name == GRAY:
            picture = draw_png(image, *(tokens[state].unflatten(0, (extractor.reader.grid, -1)) for state in squares))
    rms = {state: (sum(values) / len(values)) ** 0.5 for state, values in squares.items()}
    return {state: 100 * value / max(rms["raw"], 1e-12) for state, value in rms.items()}, (picture, "a gray image")


def worse(numbers: Mapping[str, Mapping[str, float]]) -> str:
    """A sentence that names what is further from 0 with the denoiser on than with it off; empty if nothing is."""
    off, on = numbers["raw"], numbers["denoised"]
    names = [WORDS[key] for key in off if abs(on[key]) > abs(off[key])]
    return f" Worse with the denoiser on: {'; '.join(names)}." if names else ""


def draw_png(image: torch.Tensor, raw: torch.Tensor, denoised: torch.Tensor) -> bytes:
    """The panel of an image (3, S, S) and its maps (K, K, C) with the denoiser off and on, as a PNG."""
    pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    shown = Shown(Image.fromarray(pixels), raw.float().cpu().numpy(), denoised.float().cpu().numpy(), ("", ""))
    data = io.BytesIO()
    draw([shown], "", []).save(data, "PNG")
    return data.getvalue()
