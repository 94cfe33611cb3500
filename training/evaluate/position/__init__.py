"""What features tell of their position, in photographs and in images without content."""
