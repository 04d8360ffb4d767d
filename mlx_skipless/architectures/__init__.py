"""What a source means: its config, its tensors' names and layout, the shapes of known models.

In the package, adding one touches ``families.py`` and ``shapes.py``. Knows nothing of files on
disk.
"""
