"""Weights from PyTorch, and back.

`python -m jaxkd.convert` turns a file of torchvision's, timm's or transformers' weights into a
directory of Flax variables; `read` takes such directories and such files alike; `to_torch` gives
variables PyTorch's names and layouts.
"""

from jaxkd.convert.weights import KEY, describe, named, read, to_torch

__all__ = ['KEY', 'describe', 'named', 'read', 'to_torch']
