"""Every file of weights: reading safely, fetching, saving, the real ViT of the registry."""
