"""A denoiser without training: views of images, position's part in them, the mean artifact map."""

from timm_dvt.calibration.calibrate import Calibration  # where models pickled by an older version look for it
