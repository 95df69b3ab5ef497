"""The outside world: the command, run folders, pictures and reports."""
