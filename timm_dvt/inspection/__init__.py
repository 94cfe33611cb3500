"""What a model's features hold of position and of outlier tokens, and what to do about it."""

from timm_dvt.errors import InspectionError
from timm_dvt.inspection.measure import inspect
from timm_dvt.inspection.results import (
    Blank,
    Estimate,
    Finding,
    Grid,
    Inspection,
    Layer,
    Outliers,
    Trial,
)
