"""Files of weights, as arrays by name."""

from __future__ import annotations

from collections.abc import Mapping
import pathlib

import numpy as np

from jaxkd import errors

SAFETENSORS = '.safetensors'
PICKLED = ('.pt', '.pth', '.bin')
# Under which training scripts keep the weights beside other things.
_WITHIN = ('state_dict', 'model')


def load(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays in a file, and what its metadata say; nothing in it is run.

    Raises:
      CheckpointError: there is no such file, it is damaged, or it holds something else.
      ConfigError: safetensors or PyTorch is missing.
    """
    if not path.is_file():
        raise errors.CheckpointError(path, 'there is no such file or directory')
    if path.suffix == SAFETENSORS:
        return _safetensors(path)
    if path.suffix in PICKLED:
        return _pytorch(path), {}
    known = ', '.join((SAFETENSORS, *PICKLED))
    raise errors.CheckpointError(path, f'weights are read from directories and from {known}')


def _safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        import safetensors
    except ModuleNotFoundError:
        why = "it needs `pip install 'jaxkd[export]'`"
        raise errors.ConfigError('weights', str(path), why=why) from None
    try:
        with safetensors.safe_open(path, framework='np') as file:
            return file.get_tensors(), file.metadata() or {}
    except safetensors.SafetensorError as error:
        why = f'it is damaged, or no .safetensors ({error})'
        raise errors.CheckpointError(path, why) from error


def _pytorch(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ModuleNotFoundError:
        why = "it needs `pip install 'jaxkd[torch]'`, or the same weights as .safetensors"
        raise errors.ConfigError('weights', str(path), why=why) from None
    try:
        stored = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a parser of bytes may raise anything over other bytes
        why = (
            f'torch.load finds more than weights in it, or it is damaged ({type(error).__name__}); '
            'torch.save(model.state_dict(), FILE) writes what is read'
        )
        raise errors.CheckpointError(path, why) from error
    for key in _WITHIN:
        if isinstance(stored, Mapping) and isinstance(stored.get(key), Mapping):
            stored = stored[key]
    if not isinstance(stored, Mapping) or not all(map(torch.is_tensor, stored.values())):
        why = 'it holds no state dict; torch.save(model.state_dict(), FILE) writes one'
        raise errors.CheckpointError(path, why)
    return {
        str(name): (leaf.float() if leaf.is_floating_point() else leaf).detach().numpy()
        for name, leaf in stored.items()
    }
