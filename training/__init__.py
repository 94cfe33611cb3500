"""The method behind timm_dvt: how denoisers are made and judged. Run from a checkout: python -m training.NAME."""
