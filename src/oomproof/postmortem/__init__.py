"""What went wrong in a pasted traceback or a log, in plain words, and the command that works."""
