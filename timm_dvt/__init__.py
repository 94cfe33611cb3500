"""Denoised variants of timm's Vision Transformers. Importing this package registers every *_dvt model with timm."""

from importlib import import_module
from typing import TYPE_CHECKING

from timm_dvt import interrupts, verbs  # first: what follows takes seconds; --help ends here
from timm_dvt.attach import Denoised, DenoisedEva, DenoisedVisionTransformer, add_denoiser, freeze_backbone
from timm_dvt.calibration.calibrate import Calibration, calibrate
from timm_dvt.errors import CalibrationError, WeightsNotFoundError
from timm_dvt.extraction.reader import open_features
from timm_dvt.registry import register, register_all
from timm_dvt.version import __version__
from timm_dvt.weights.checkpoints import CheckpointError, load_denoiser
from timm_dvt.weights.saving import save_pretrained

if TYPE_CHECKING:
    from timm_dvt.inspection import inspect

register_all()


def __getattr__(name: str):
    if name != "inspect":  # whose room is entered by those alone who ask for it
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("timm_dvt.inspection").inspect
