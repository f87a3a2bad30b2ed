"""Runs models, and says how far two of them are apart."""
