"""Clean features of images, folders, data sets and videos, on disk: `timm-dvt extract`, `timm_dvt.open_features`."""
