"""Denoised variants of timm's Vision Transformers. Importing this package registers every *_dvt model with timm."""

from timm_dvt.version import __version__
