"""Put a trained denoised ViT into the package, in half precision: python -m training.embed FOLDER

FOLDER is what training.train_denoiser wrote on the backbone of training.pretrain_tiny. The backbone and the denoiser
become the two files of timm_dvt/assets/stamps, which timm.create_model("vit_tiny_patch16_224.stamps_dvt") reads.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from timm_dvt import embedded
from timm_dvt.variants import EMBEDDED
from training.shared_folder import OutputError, write_atomically


def embed(folder: Path, target: Path) -> dict[str, int]:
    """Write `target`/backbone.safetensors and `target`/denoiser.safetensors; returns their sizes in bytes.

    Raises:
        ValueError: the folder holds no denoised `vit_tiny_patch16_224.stamps`.
    """
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            backbone = (file.metadata() or {}).get("backbone")
            state = {key: file.get_tensor(key).half() for key in file.keys()}
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{folder}/model.safetensors cannot be read: {e}") from e
    denoiser = {key: tensor for key, tensor in state.items() if key.startswith("denoiser.")}
    rest = {key: tensor for key, tensor in state.items() if key not in denoiser}
    if backbone != EMBEDDED.backbone or not denoiser or not rest:
        raise ValueError(f"{folder} must hold {EMBEDDED.backbone} and its denoiser, not {backbone}'s")
    sizes = {}
    for name, tensors in (("backbone", rest), ("denoiser", denoiser)):
        data = save(tensors, {"format": "pt", "backbone": EMBEDDED.backbone})
        write_atomically(target / f"{name}.safetensors", data)
        sizes[name] = len(data)
    return sizes


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 with a line that says what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m training.embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    args = parser.parse_args(argv)
    try:
        sizes = embed(args.folder, Path(str(embedded.FOLDER)))
    except (ValueError, OutputError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(", ".join(f"{name} {size:,} bytes" for name, size in sizes.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
