"""One conversion from a user's options to a folder: open, plan, decide, write, check.

Knows nothing of terminals and of training.
"""
