"""Denoised variants of timm's Vision Transformers. Importing this package registers every *_dvt model with timm."""

from timm_dvt import interrupts  # first: what follows takes seconds
from timm_dvt.calibration import Calibration, CalibrationError, calibrate
from timm_dvt.extraction.reader import open_features
from timm_dvt.fetching import WeightsNotFoundError
from timm_dvt.model import Denoised, DenoisedEva, DenoisedVisionTransformer, add_denoiser, freeze_backbone
from timm_dvt.registry import register, register_all
from timm_dvt.saving import save_pretrained
from timm_dvt.version import __version__
from timm_dvt.weights import CheckpointError, load_denoiser

register_all()
