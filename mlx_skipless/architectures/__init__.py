"""What a source means: its config, its tensors' names and layout, the shapes of known models.

Adding an architecture touches ``families.py`` alone. Knows nothing of files on disk.
"""
