"""The package's one version number, importable without importing torch."""

__version__ = "0.2.0"

# Where the code lies. OWNER stands for an account: CONTRIBUTING.md says how to set it everywhere.
REPOSITORY = "https://github.com/OWNER/timm-dvt"
