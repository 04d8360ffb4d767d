"""Models on disk and on the Hub: found, checked, read tensor by tensor, written whole.

Knows nothing of what is done to a model between reading and writing.
"""
