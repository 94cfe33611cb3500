"""Object detection on frozen maps: the paper's protocol and the repository's."""
