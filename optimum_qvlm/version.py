"""The package's version; the build and the files we save read it from here."""

__version__ = "0.1.0.dev0"
