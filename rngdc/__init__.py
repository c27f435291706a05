"""The face of the project: the `rngdc` command. Importing this package imports nothing heavy."""

__version__ = "0.1.0"
