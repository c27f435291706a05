"""The dialects of this layer, one a file."""
