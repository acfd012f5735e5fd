"""MobileNetV2."""

import ml_collections

PRESETS = ('digits', 'fashion_mnist', 'cifar10', 'cifar100', 'imagenet')


def get_config(preset: str = 'digits') -> ml_collections.ConfigDict:
    if preset not in PRESETS:
        raise ValueError(f'{preset!r} is not one of {", ".join(PRESETS)}')
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.model = ml_collections.ConfigDict(
        {
            'name': 'mobilenet_v2',
            'arguments': {'width': 1.0, 'stem_stride': 1, 'strides': (1, 1, 2, 1, 1, 2, 1)},
        }
    )
    config.data = ml_collections.ConfigDict(
        {'name': 'digits', 'padding': 1, 'flip': True, 'validation': 0.1}
    )
    config.data.labels = ml_collections.config_dict.placeholder(int)
    config.data.dir = ml_collections.config_dict.placeholder(str)
    config.budget = ml_collections.ConfigDict({'flops': 0.5, 'params': 1.0, 'activations': 1.0})
    config.blocks = ()
    stage = {
        'batch_size': 64,
        'warmup_epochs': 2.0,
        'final_fraction': 0.0,
        'momentum': 0.9,
        'weight_decay': 5e-4,
        'ema_decay': 0.95,
    }
    soft = {'alpha': 0.9, 'temperature': 4.0}
    config.teacher = ml_collections.ConfigDict(
        {**stage, 'epochs': 30.0, 'learning_rate': 0.05, 'label_smoothing': 0.0}
    )
    config.search = ml_collections.ConfigDict(
        {
            **stage,
            **soft,
            'epochs': 15.0,
            'learning_rate': 0.02,
            'final_fraction': 0.2,
            'ramp': 0.8,
            'coupling': 'max',
        }
    )
    config.distil = ml_collections.ConfigDict(
        {**stage, **soft, 'epochs': 40.0, 'learning_rate': 0.03}
    )
    config.log_every = 20
    config.checkpoint_seconds = 20.0
    return config
