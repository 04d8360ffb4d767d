"""What can go from a network and how: merged matrices, sub-layers, the first layer as a table.

Knows nothing of quantized formats, and nothing of users' wishes but what a plan holds.
"""
