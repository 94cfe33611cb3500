"""Semantic segmentation: linear head, nearest neighbors, the repository's protocol."""
