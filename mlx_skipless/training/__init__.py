"""Training and healing: recipes, the loop that stops and goes on bit for bit, and what it writes.

Knows nothing of terminals.
"""
