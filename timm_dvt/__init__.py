"""Denoised variants of timm's Vision Transformers. Importing this package registers every *_dvt model with timm."""

from importlib import import_module
from typing import TYPE_CHECKING

from timm_dvt import interrupts, verbs  # first: what follows takes seconds; --help ends here
from timm_dvt.attach import Denoised, DenoisedEva, DenoisedVisionTransformer, add_denoiser, freeze_backbone
from timm_dvt.calibration.calibrate import Calibration, calibrate
from timm_dvt.errors import CalibrationError, WeightsNotFoundError
from timm_dvt.registry import register, register_all
from timm_dvt.version import __version__
from timm_dvt.weights.checkpoints import CheckpointError
from timm_dvt.weights.denoisers import load_denoiser
from timm_dvt.weights.saving import save_pretrained

if TYPE_CHECKING:
    from timm_dvt.extraction.reader import open_features
    from timm_dvt.extraction.run import extract
    from timm_dvt.inspection import inspect

# Their rooms are entered by those alone who ask for them.
LATER = {
    "inspect": "timm_dvt.inspection",
    "extract": "timm_dvt.extraction.run",
    "open_features": "timm_dvt.extraction.reader",
}

register_all()
PUBLIC = """
    Calibration CalibrationError CheckpointError Denoised DenoisedEva DenoisedVisionTransformer WeightsNotFoundError
    add_denoiser calibrate freeze_backbone load_denoiser register save_pretrained
""".split()
__all__ = [*PUBLIC, *LATER]


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str):
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(LATER[name]), name)
