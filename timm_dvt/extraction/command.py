"""timm-dvt extract: its options; what it does is in timm_dvt/extraction/run.py."""

import argparse

from timm_dvt.extraction.settings import add_options, settings_of


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `extract` to the commands of `python -m timm_dvt`."""
    command = commands.add_parser(
        "extract",
        help="write clean features of a folder, a data set or a video",
        description="Write dense features of images for use elsewhere: zarr for xarray, parquet for pandas, "
        "safetensors or npy. Kill it whenever you like; the same command continues, on any number of processes and "
        "machines that see the folder. timm_dvt.open_features(FOLDER) reads it.",
        epilog="Example: %(prog)s photos --model vit_base_patch14_dinov2.lvd142m_dvt --out features",
    )
    add_options(command)
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from timm_dvt.extraction.run import extract

    extract(settings_of(args))
