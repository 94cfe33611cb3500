"""Judges frozen features, raw against denoised: python -m training.evaluate TASK; see __main__.py."""
