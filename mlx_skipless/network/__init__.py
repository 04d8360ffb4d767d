"""What runs: the networks, what their tensors are called, where their stream's basis is free.

Knows nothing of files, of families of architectures, or of what is done to a network.
"""
