"""What people see of a calibration afterwards."""
