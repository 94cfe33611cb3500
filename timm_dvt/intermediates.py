"""The forms in which timm's forward_intermediates returns maps, with or without final features and prefix tokens."""

import torch

# timm's list and dict outputs, with the last block's map among them.
Intermediates = list[torch.Tensor] | tuple | dict


def unpack(output: Intermediates, only: bool) -> tuple[torch.Tensor | None, list, list | None]:
    """Final features, maps and prefix tokens out of any form timm returns them in."""
    if isinstance(output, dict):
        prefixes = output.get("image_intermediates_prefix")
        return output.get("image_features"), list(output["image_intermediates"]), prefixes
    features, maps = (None, output) if only else output
    if maps and isinstance(maps[0], tuple):
        return features, [m for m, _ in maps], [p for _, p in maps]
    return features, list(maps), None


def repack(output: Intermediates, features: torch.Tensor | None, maps: list, prefixes: list | None) -> Intermediates:
    """The form of `output` with these contents."""
    if isinstance(output, dict):
        new = {"image_intermediates": maps, "image_intermediates_prefix": prefixes, "image_features": features}
        kept = (key for key in output if features is not None or key != "image_features")
        return {key: new.get(key, output[key]) for key in kept}
    if prefixes is not None:
        maps = list(zip(maps, prefixes, strict=True))
    return maps if features is None else (features, maps)
