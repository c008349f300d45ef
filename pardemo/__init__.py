"""pardemo: learn parallel training in PyTorch by measuring it, then plan it for a cluster."""

__version__ = "0.1.0"
