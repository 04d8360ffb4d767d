"""Fewer bits: formats, fitting against text, bits for each matrix, distillation.

Knows nothing of how a conversion is asked for, written and checked.
"""
