"""The version of the library, which adapter files name."""

__version__ = "0.2.0"
