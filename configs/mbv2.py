"""MobileNetV2 at a fraction of its cost, taught by itself.

    python -m jaxkd.main --config=configs/mbv2.py[:PRESET] [--workdir=DIR] [--config.FIELD=VALUE …]

| preset        | images                    | on 2 CPU cores | teacher       | compact, ½ FLOPs |
| ------------- | ------------------------- | -------------- | ------------- | ---------------- |
| digits        | 1,797 of 8×8, no download | 5 minutes      | 0.986 ± 0.003 | 0.990 ± 0.003    |
| fashion_mnist | 70,000 of 28×28           | 80 minutes     | 0.9313        | 0.9293           |
| cifar10       | 60,000 of 32×32           | not yet run    |               |                  |
| cifar100      | 60,000 of 32×32           | not yet run    |               |                  |
| imagenet      | 1.3 million of 224×224    | not yet run    |               |                  |

Three seeds of digits, which is at 0.994 ± 0.001 with 1/5.2 of the parameters, and one seed of
fashion_mnist, with other learning rates and an earlier search: digits.json, digits_params.json and
fashion_mnist.json in benchmarks/results/.
Accuracies are on the test part, which is read once, at the end. Fields that are often changed:

    --config.budget.flops=0.25       a share of the full network, or a number of multiply-adds > 1
    --config.budget.params=0.192     with several budgets all hold; 1.0 sets no limit
    --config.budget.latency=0.5      of one image, measured on this device; above 1: milliseconds
    --config.blocks="(('block1/', {'strength': 2.0}), ('head', {'min_keep': 0.5}))"
    --config.blocks="(('block1[0-6]/', {'resource': 'params', 'start': 0.3, 'end': 0.8}),)"
    --config.blocks=auto             every module that repeats; the report says what each keeps
    --config.blocks="(('block', {'removable': True}),)"     residual branches may go whole
    --config.search.expand=True      search for less, then widen to the budget again; layers may
                                     become wider than they were
    --config.search.round_to=8       channels in multiples of 8, the budget still met
    --config.data.name=folder:/data/flowers --config.data.image_size=64
    --config.data.augment.trivial_augment=True --config.data.augment.mixup=0.2
    --config.on_nan=rollback         where the loss explodes, go back an epoch and learn more slowly
    --config.distil.choose=best      the variables with the best validation accuracy, not the last
    --config.compute_dtype=bfloat16  trains in it; parameters and what is reported stay float32
    --config.distil.losses="(('dkd', {'beta': 2.0, 'warmup': 0.2}),)"   beside the labels
    --config.distil.losses="(('fitnet', {'weight': 10.0, 'features': 'block1[0-6]$'}),)"
    --config.teacher.number=3        the mean of three teachers' logits teaches
    --config.model.name=package.module:function --config.model.arguments={}     one of your own
    --config.teacher.checkpoint=weights.safetensors   that is trained already
    --config.teacher.accumulate=4    each batch in so many parts, where memory is short
    --config.export="('stablehlo', 'onnx')"   files that run without the code, in WORKDIR/export/
    --config.seed=1
    --config.teacher.epochs=60.0
"""

import ml_collections
from ml_collections import config_dict

PRESETS = ('digits', 'fashion_mnist', 'cifar10', 'cifar100', 'imagenet')


def get_config(preset: str = 'digits') -> ml_collections.ConfigDict:
    """The config of a preset, every field of it."""
    if preset not in PRESETS:
        raise ValueError(f'{preset!r} is not one of {", ".join(PRESETS)}')
    config = ml_collections.ConfigDict(
        {
            'seed': 0,  # of initial weights, batches, augmentation and the validation part
            'model': {
                # A network of jaxkd.models, or package.module:function of your own: a function that
                # returns a Linen module when it is called with the arguments, and with num_classes
                # where it takes that.
                'name': 'mobilenet_v2',
                # Of the network. Small images cannot be halved five times, as the paper does it.
                'arguments': {'width': 1.0, 'stem_stride': 1, 'strides': (1, 1, 2, 1, 1, 2, 1)},
            },
            'data': {
                'name': 'digits',  # what `python -m jaxkd.data list` prints, or folder:PATH
                'labels': config_dict.placeholder(int),  # keep so many training examples
                'validation': 0.1,  # share of the training split
                'dir': config_dict.placeholder(str),  # where tensorflow-datasets has prepared them
                'image_size': config_dict.placeholder(int),  # of a folder's images, in pixels
                # Of images that are decoded when they are read, those of folders and of ImageNet:
                'crop': 0.08,  # least share of the area that a random crop shows; 1.0: the centre
                'workers': 0,  # processes that read ahead; 0 for threads of the main process
                'corrupt_limit': 10,  # so many that cannot be read are replaced, no more
                # Of each channel, of pixels in [0, 1]; by default those of the training images.
                'mean': config_dict.placeholder(tuple),
                'std': config_dict.placeholder(tuple),  # likewise
                'padding': 1,  # random shifts by up to so many pixels
                'flip': True,  # where it keeps the label's meaning
                # Done on the device, to the view that the teacher sees, too; nothing by default.
                'augment': {
                    'color_jitter': 0.0,  # strength; 0.4 is usual
                    'trivial_augment': False,  # one of 14 operations an image
                    'erasing': 0.0,  # probability; 0.25 is usual
                    'mixup': 0.0,  # α of Beta(α, α); 0.2 is usual
                    'cutmix': 0.0,  # likewise; 1.0 is usual; with both, one of the two an image
                },
            },
            # Shares of the full network, or absolute numbers above 1; 1.0 sets no limit. All hold.
            'budget': {
                'flops': 0.5,  # multiply-adds of one image
                'params': 1.0,  # elements of the collection 'params'
                'activations': 1.0,  # bytes that convolutions and dots write for one image
                'latency': 1.0,  # of one image on this device; above 1: milliseconds
            },
            # Pairs of a pattern over parameter paths and settings: strength, resource, min_keep,
            # max_keep, budget, freeze, removable, start, end (see jaxkd/search/blocks.py). Or
            # 'auto'.
            'blocks': (),
            'inexact': 'freeze',  # or 'allow': cut under LayerNorm, where the others then change
            # Training computes in this, or in 'bfloat16'; parameters, statistics and what is
            # evaluated and reported stay float32.
            'compute_dtype': 'float32',
            # Of parameters over devices: pairs of a pattern over parameter paths and a partition,
            # such as (('kernel', (None, None, None, 'data')),); the others are on every device
            # (see jaxkd/mesh.py).
            'sharding': (),
            # Formats in which the compact network is written, too: 'stablehlo', 'onnx' (needs the
            # extra `export`), 'tflite' (`tensorflow`), 'safetensors' (`export`; for PyTorch).
            'export': ('stablehlo',),
            'log_every': 20,  # steps between two rows of the log
            'checkpoint_seconds': 20.0,  # between two saves, in the background
            'wandb': config_dict.placeholder(str),  # a project of Weights & Biases to draw in too
            'checkpoint_keep': 2,  # states of each stage, to go back to where one is damaged
            # Where the loss is no finite number, or 100 times that of guessing: 'stop', or
            # 'rollback' to the end of the last epoch, and on more slowly.
            'on_nan': 'stop',
            'nan_factor': 0.5,  # of the learning rate, after a rollback
            'nan_times': 3,  # rollbacks of a stage, at most
        }
    )
    stage = {
        'batch_size': 64,  # a multiple of the number of devices
        # Parts that a batch is computed in, one after the other, where it is too large for the
        # devices' memory at once; BatchNorm then normalizes each by its own statistics.
        'accumulate': 1,
        'warmup_epochs': 2.0,  # in which the learning rate rises from 0; then it falls as a cosine
        'final_fraction': 0.0,  # of the learning rate, at the end
        'momentum': 0.9,  # Nesterov's
        'weight_decay': 5e-4,  # of kernels
        'ema_decay': 0.95,  # in a step, of the average of the variables
    }
    soft = {
        'alpha': 0.5,  # the loss is (1 - alpha) · cross-entropy + alpha · Hinton's
        'temperature': 2.0,  # of Hinton's loss
        # In place of that, pairs of a loss and its settings, such as (('labels',
        # {'weight': 0.1}), ('dkd', {'beta': 2.0, 'warmup': 0.2})): a weighted sum, in which
        # 'labels' counts 1 unless told otherwise (see jaxkd/objective.py).
        'losses': (),
    }
    choose = {
        # What a stage hands on: the averages after its 'last' step, or the 'best' by validation.
        'choose': 'last',
    }
    config.teacher = (
        stage
        | choose
        | {
            'epochs': 30.0,  # how often it sees the training images
            'learning_rate': 0.05,  # the highest
            'label_smoothing': 0.0,  # makes for a worse teacher
            # So many, with seeds of their own; the mean of their logits teaches. The first is the
            # one that is made smaller.
            'number': 1,
            # Weights that there are, as they are or after tune_epochs of training: a folder that
            # `python -m jaxkd.convert` or orbax wrote, or .safetensors.
            'checkpoint': config_dict.placeholder(str),
            'tune_epochs': config_dict.placeholder(float),  # of these weights; by default none
            # A regular expression over the paths of parameters that begin anew, such as
            # 'classifier/' where the weights are of other classes.
            'fresh': config_dict.placeholder(str),
        }
    )
    config.search = (
        stage
        | soft
        | {
            # 'learn', 'morphnet' (without a teacher), or a criterion: 'l1', 'taylor', …
            'method': 'learn',
            # What channels are worth when a learned search begins: a criterion (but 'uniform' and
            # 'random'), or 'gates', the size of their gates.
            'worth': 'fisher',
            'rounds': 1,  # in which a criterion cuts, evenly over the search
            'epochs': 12.0,  # how often it sees the training images
            'learning_rate': 0.02,  # the highest
            'final_fraction': 0.2,  # of the learning rate, at the end
            'ramp': 0.8,  # share of the search in which the cost falls to the budget
            # What closes: 'norm', the scales of norms and numbers of its own where no norm would
            # do; 'explicit', such numbers throughout; 'sigmoid', random ones (FiGS).
            'gates': 'norm',
            'coupling': 'max',  # of several norms: their largest scale, or the 'mean', or 'l2'
            # Cut when less than this share of what is computed is alive; 0 never, which is faster
            # here, where the steps that are saved are fewer than those that compiling takes.
            'shrink': 0.0,
            # Of every group that no block gives another, as a share; by default 1/8 of the width
            # at which a network as narrow everywhere would meet the budget.
            'min_keep': config_dict.placeholder(float),
            # Search for less, and widen all that is left by a common factor to the budget again
            # (MorphNet).
            'expand': False,
            'expand_from': 0.7,  # for how much: a share of each budget
            'alternations': 1,  # so often, one search a time
            'round_to': 1,  # each group keeps a multiple of so many channels; 8 suits TPU and GPU
        }
    )
    config.distil = (
        stage
        | choose
        | soft
        | {
            'epochs': 35.0,  # how often it sees the training images
            'learning_rate': 0.03,  # the highest
            # What it does otherwise than data.augment, field by field.
            'augment': {
                'color_jitter': config_dict.placeholder(float),  # as there
                'trivial_augment': config_dict.placeholder(bool),  # as there
                'erasing': config_dict.placeholder(float),  # as there
                'mixup': config_dict.placeholder(float),  # as there
                'cutmix': config_dict.placeholder(float),  # as there
            },
            # Who teaches: the 'teacher', or the 'average' of the network's own variables.
            'teacher': 'teacher',
            'init': 'search',  # or 'scratch': new weights for the structure found
            'recalibrate': 0,  # batches that correct the running statistics first
        }
    )
    if preset != 'digits':
        _PRESETS[preset](config)
    return config


def _lengths(
    config: ml_collections.ConfigDict,
    epochs: tuple[float, float, float],
    learning_rates: tuple[float, float, float],
    **shared: float,
) -> None:
    """Sets epochs and learning rate of teacher, search and distil, and what all three share.

    They are long enough that cutting while searching pays.
    """
    for stage, *values in zip(('teacher', 'search', 'distil'), epochs, learning_rates, strict=True):
        config[stage].update(epochs=values[0], learning_rate=values[1], **shared)
    config.search.shrink = 0.7


def _fashion_mnist(config: ml_collections.ConfigDict) -> None:
    config.data.update(name='fashion_mnist', padding=1)
    config.model.arguments.update(stem_stride=2, strides=(1, 2, 2, 1, 1, 2, 1))
    _lengths(
        config,
        (16.0, 4.0, 12.0),
        # A faster distillation undoes what the search has left (benchmarks/ablation.py).
        (0.05, 0.02, 0.02),
        batch_size=128,
        warmup_epochs=0.5,
        ema_decay=0.998,
    )
    config.update(log_every=50, checkpoint_seconds=60.0)


def _cifar(config: ml_collections.ConfigDict, name: str) -> None:
    config.data.update(name=name, padding=4)
    config.model.arguments.update(strides=(1, 1, 2, 2, 1, 2, 1))
    _lengths(
        config,
        (200.0, 40.0, 160.0),
        (0.1, 0.02, 0.05),
        batch_size=128,
        warmup_epochs=5.0,
        ema_decay=0.999,
    )
    config.update(log_every=100, checkpoint_seconds=300.0)


def _imagenet(config: ml_collections.ConfigDict) -> None:
    config.data.update(name='imagenet2012', padding=0, validation=0.02, workers=8)
    config.model.arguments.update(stem_stride=2, strides=(1, 2, 2, 2, 1, 2, 1))
    _lengths(
        config,
        (150.0, 20.0, 100.0),
        (0.4, 0.1, 0.2),
        batch_size=1024,
        warmup_epochs=5.0,
        weight_decay=4e-5,
        ema_decay=0.9999,
    )
    config.update(log_every=100, checkpoint_seconds=600.0)


_PRESETS = {
    'fashion_mnist': _fashion_mnist,
    'cifar10': lambda config: _cifar(config, 'cifar10'),
    'cifar100': lambda config: _cifar(config, 'cifar100'),
    'imagenet': _imagenet,
}
