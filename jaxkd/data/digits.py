"""scikit-learn's digits, which need no download."""

from __future__ import annotations

import numpy as np

from jaxkd.data.split import Split, in_memory, stratified
from jaxkd.errors import ConfigError


def read(part: str) -> Split:
    """scikit-learn's digits, with the same 540 of them as test split always."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ConfigError(
            'data.name', 'digits', why='it needs scikit-learn: pip install scikit-learn'
        ) from error
    bunch = datasets.load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # from 0..16
    labels = bunch.target.astype(np.int32)
    test = stratified(labels, 540, np.random.default_rng(20200523))
    chosen = test if part == 'test' else np.setdiff1d(np.arange(len(labels)), test)
    return in_memory(images[chosen], labels[chosen])
