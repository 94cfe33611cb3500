"""Cards, conversion, publishing on the Hub, published numbers."""
