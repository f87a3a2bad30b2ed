"""Whether the parts of the method do what they claim."""
