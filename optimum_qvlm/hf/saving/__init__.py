"""Saving and uploading: whole or not at all."""
