"""The version, in one place: of the installed package, of kernels that are kept, and of whatever is written into results."""

__version__ = "0.4.0"
