"""The form of a checkpoint: what it records, and how that is read and checked."""
