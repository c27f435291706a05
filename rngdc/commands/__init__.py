"""The subcommands of `rngdc`, a file for each kind. They import what they need when they run."""
