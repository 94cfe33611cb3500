"""timm-dvt extract: its options; what it does is in timm_dvt/extraction/run.py."""

import argparse

from timm_dvt.extraction.run import run
from timm_dvt.extraction.settings import ExtractSettings, add_extract_options
from timm_dvt.options import build


def add_extract(parser: argparse.ArgumentParser) -> None:
    """Options of `extract`."""
    parser.description = (
        "Write dense features of images for use elsewhere: zarr for xarray, parquet for pandas, safetensors or npy. "
        "Kill it whenever you like; the same command continues, on any number of processes and machines that see the "
        "folder. timm_dvt.open_features(FOLDER) reads it."
    )
    parser.epilog = "Example: %(prog)s photos --model vit_base_patch14_dinov2.lvd142m_dvt --out features"
    add_extract_options(parser)
    parser.set_defaults(run=lambda args: run(build(ExtractSettings, args)))
