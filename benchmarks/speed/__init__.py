"""Time and memory: single linears, whole models, loading, calibration."""
