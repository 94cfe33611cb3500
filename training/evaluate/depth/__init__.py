"""Depth from a linear head: the paper's protocol and the repository's."""
