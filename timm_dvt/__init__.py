"""Denoised variants of timm's Vision Transformers. Importing this package registers every *_dvt model with timm."""

from timm_dvt import interrupts, verbs  # first: what follows takes seconds; --help ends here
from timm_dvt.attach import Denoised, DenoisedEva, DenoisedVisionTransformer, add_denoiser, freeze_backbone
from timm_dvt.calibration.calibrate import Calibration, calibrate
from timm_dvt.errors import CalibrationError, WeightsNotFoundError
from timm_dvt.registry import register, register_all
from timm_dvt.version import __version__
from timm_dvt.weights.checkpoints import CheckpointError, load_denoiser
from timm_dvt.weights.saving import save_pretrained

register_all()
