"""Where the parts of a model family sit."""
