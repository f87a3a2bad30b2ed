"""The report as a page: one HTML file without any other, and a picture for the model card."""
