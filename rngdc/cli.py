"""The `rngdc` command."""
