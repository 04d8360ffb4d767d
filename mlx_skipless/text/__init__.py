"""Text: files and data sets read as documents, tokens to train, to calibrate and to check with.

Knows nothing of removals and formats.
"""
