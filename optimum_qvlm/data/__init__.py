"""Calibration data: what was asked for, and how it becomes model inputs."""
