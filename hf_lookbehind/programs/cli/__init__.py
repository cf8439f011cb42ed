"""The command line: flags, files of settings, folders, exit codes."""
