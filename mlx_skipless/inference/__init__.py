"""Running a model: loading it, generating text with it, talking with it.

mlx-lm does the sampling and the decoding. Knows nothing of conversions.
"""
