"""Measurements whose results are ratios within one run: python -m training.benchmark NAME."""
