"""What every other layer may write with: whole files or none."""
