"""The commands: `crate-fast SUBCOMMAND`."""
