"""Calibration: from a loaded model and data to packed linears."""
