"""The package's one version number, importable without importing torch."""

__version__ = "0.2.0"
