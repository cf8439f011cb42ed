"""What the programs of `scripts/` share: flags, data, metrics, exit codes."""
