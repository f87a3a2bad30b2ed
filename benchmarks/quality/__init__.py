"""What rounding costs in quality, beside full precision and other libraries."""
