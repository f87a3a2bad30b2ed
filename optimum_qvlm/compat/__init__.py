"""Every touch of what other libraries keep private or change between releases: one function each, with its reason."""
