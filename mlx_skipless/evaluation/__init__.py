"""Measurements of models: speed, perplexity, task scores, what could go and what it would cost.

Knows nothing of conversions under way, and nothing of terminals.
"""
