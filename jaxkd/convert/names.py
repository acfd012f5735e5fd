"""What the layers of `jaxkd.models` are called in PyTorch: a table for each library and family.

A table is a function of the model (its depths decide on names) and gives a row for each layer. What
no file of weights tells (a BatchNorm's epsilon, padding, activations) stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
import itertools
import math
from typing import Any, NamedTuple

from flax import linen as nn

from jaxkd.convert import layouts
from jaxkd.models import (
    convnext,
    densenet,
    efficientnet,
    mobilenet,
    mobilenet_v1,
    mobilenet_v3,
    mobilevit,
    regnet,
    resnet,
    vgg,
)


class Row(NamedTuple):
    """One layer, or one parameter.

    Attributes:
      ours: path of the layer, or of the parameter, below its collection.
      theirs: its name in PyTorch.
      layout: of the parameter, or of the layer's kernel; None for the usual one.
    """

    ours: str
    theirs: str
    layout: layouts.Layout | None = None


Settings = Mapping[str, Any]


class Source(NamedTuple):
    """A library's networks of one family.

    Attributes:
      table: the rows for a model.
      settings: for a model, the fields in which it has to differ from the defaults in order to
        compute what the library's networks do. Where these differ among themselves there are
        several, the usual one first.
    """

    table: Callable[[Any], Iterator[Row]]
    settings: Callable[[Any], tuple[Settings, ...]] = lambda model: ({},)


# Fields that change what a network computes and leave the shapes of its variables as they are.
FIELDS = ('activation', 'bn_epsilon', 'norm_epsilon', 'padding')


def always(*settings: Settings) -> Callable[[Any], tuple[Settings, ...]]:
    return lambda model: settings


def conv_bn(ours: str, conv: str, bn: str) -> Iterator[Row]:
    yield Row(f'{ours}/conv', conv)
    yield Row(f'{ours}/bn', bn)


def pair(ours: str, theirs: str) -> Iterator[Row]:
    """Convolution and BatchNorm as 0 and 1 of one module."""
    return conv_bn(ours, f'{theirs}.0', f'{theirs}.1')


def normalized(ours: str, theirs: str) -> Iterator[Row]:
    """As `transformers` mostly calls them."""
    return conv_bn(ours, f'{theirs}.convolution', f'{theirs}.normalization')


def squeeze(ours: str, first: str, second: str) -> Iterator[Row]:
    yield Row(f'{ours}/squeeze_excite/squeeze', first)
    yield Row(f'{ours}/squeeze_excite/excite', second)


def places(depths: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """Number, stage and number in the stage of each block.

    >>> list(places([1, 2]))
    [(0, 0, 0), (1, 1, 0), (2, 1, 1)]
    """
    number = itertools.count()
    for stage, depth in enumerate(depths):
        for index in range(depth):
            yield next(number), stage, index


# torchvision.


def _torchvision_mobilenet_v2(model: mobilenet.MobileNetV2) -> Iterator[Row]:
    yield from pair('stem', 'features.0')
    count = sum(repeats for *_, repeats in mobilenet.STAGES)
    for number in range(count):
        ours, theirs = f'block{number}', f'features.{number + 1}.conv'
        layers = ('expand', 'depthwise') if number else ('depthwise',)  # the first has none
        for place, layer in enumerate(layers):
            yield from pair(f'{ours}/{layer}', f'{theirs}.{place}')
        last = len(layers)
        yield from conv_bn(f'{ours}/project', f'{theirs}.{last}', f'{theirs}.{last + 1}')
    yield from pair('head', f'features.{count + 1}')
    yield Row('classifier', 'classifier.1')


def _torchvision_inverted(ours: str, theirs: str, expands: bool, excites: bool) -> Iterator[Row]:
    place = itertools.count()
    if expands:
        yield from pair(f'{ours}/expand', f'{theirs}.{next(place)}')
    yield from pair(f'{ours}/depthwise', f'{theirs}.{next(place)}')
    if excites:
        here = f'{theirs}.{next(place)}'
        yield from squeeze(ours, f'{here}.fc1', f'{here}.fc2')
    yield from pair(f'{ours}/project', f'{theirs}.{next(place)}')


def _torchvision_mobilenet_v3(model: mobilenet_v3.MobileNetV3) -> Iterator[Row]:
    yield from pair('stem', 'features.0')
    excites = [stage.excite for stage in model.stages for _ in stage.expanded]
    for number, excite in enumerate(excites):
        theirs = f'features.{number + 1}.block'
        yield from _torchvision_inverted(f'block{number}', theirs, number > 0, excite)
    yield from pair('head', f'features.{len(excites) + 1}')
    yield Row('hidden', 'classifier.0')
    yield Row('classifier', 'classifier.3')


def _efficientnet_depths(model: efficientnet.EfficientNet) -> list[int]:
    return [math.ceil(repeats * model.depth) for *_, repeats in efficientnet.STAGES]


def _torchvision_efficientnet(model: efficientnet.EfficientNet) -> Iterator[Row]:
    yield from pair('stem', 'features.0')
    depths = _efficientnet_depths(model)
    for number, stage, index in places(depths):
        theirs = f'features.{stage + 1}.{index}.block'
        yield from _torchvision_inverted(f'block{number}', theirs, stage > 0, True)
    yield from pair('head', f'features.{len(depths) + 1}')
    yield Row('classifier', 'classifier.1')


def _torchvision_efficientnet_settings(model: efficientnet.EfficientNet) -> tuple[Settings, ...]:
    return ({'bn_epsilon': 1e-3 if model.width > 1.5 else 1e-5},)  # B5 to B7 are TensorFlow's


def _torchvision_resnet(model: resnet.ResNet) -> Iterator[Row]:
    yield from conv_bn('stem', 'conv1', 'bn1')
    for _, stage, index in places(model.depths):
        ours, theirs = f'stage{stage + 1}_block{index}', f'layer{stage + 1}.{index}'
        for layer in (1, 2, 3):
            yield from conv_bn(
                f'{ours}/conv{layer}', f'{theirs}.conv{layer}', f'{theirs}.bn{layer}'
            )
        yield from pair(f'{ours}/shortcut', f'{theirs}.downsample')
    yield Row('classifier', 'fc')


def _vgg_features(model: vgg.VGG) -> Iterator[Row]:
    place = 0
    for stage, (depth, stride) in enumerate(zip(model.depths, model.strides, strict=True), start=1):
        for index in range(depth):
            ours = f'stage{stage}_conv{index}'
            yield from conv_bn(ours, f'features.{place}', f'features.{place + 1}')
            place += 3  # a ReLU, too
        place += stride > 1


def _last_bias(model: vgg.VGG) -> str:
    return f'params/stage{len(model.depths)}_conv{model.depths[-1] - 1}/conv/bias'


def _torchvision_vgg(model: vgg.VGG) -> Iterator[Row]:
    yield from _vgg_features(model)
    if model.small_images:
        yield Row('classifier', 'classifier')
        return
    yield Row('hidden1', 'classifier.0', layouts.flattened(_last_bias(model)))
    yield Row('hidden2', 'classifier.3')
    yield Row('classifier', 'classifier.6')


def _torchvision_densenet(model: densenet.DenseNet) -> Iterator[Row]:
    yield Row('stem', 'features.conv0')
    yield Row('stem_bn', 'features.norm0')
    for block, depth in enumerate(model.depths, start=1):
        for layer in range(depth):
            theirs = f'features.denseblock{block}.denselayer{layer + 1}'
            for conv in (1, 2):
                ours = f'block{block}_layer{layer}_conv{conv}'
                yield from conv_bn(ours, f'{theirs}.conv{conv}', f'{theirs}.norm{conv}')
        theirs = f'features.transition{block}'
        yield from conv_bn(f'transition{block}', f'{theirs}.conv', f'{theirs}.norm')
    yield Row('bn', f'features.norm{len(model.depths) + 1}')
    yield Row('classifier', 'classifier')


def _torchvision_regnet(model: regnet.RegNetY) -> Iterator[Row]:
    yield from pair('stem', 'stem')
    for _, stage, index in places(model.depths):
        ours = f'stage{stage + 1}_block{index}'
        theirs = f'trunk_output.block{stage + 1}.block{stage + 1}-{index}'
        for layer, name in enumerate('abc', start=1):
            yield from pair(f'{ours}/conv{layer}', f'{theirs}.f.{name}')
        yield from squeeze(ours, f'{theirs}.f.se.fc1', f'{theirs}.f.se.fc2')
        yield from pair(f'{ours}/shortcut', f'{theirs}.proj')
    yield Row('classifier', 'fc')


def _torchvision_convnext(model: convnext.ConvNeXt) -> Iterator[Row]:
    yield Row('stem', 'features.0.0')
    yield Row('stem_norm', 'features.0.1')
    for stage in range(1, len(model.depths)):
        yield Row(f'downsample{stage}_norm', f'features.{2 * stage}.0')
        yield Row(f'downsample{stage}', f'features.{2 * stage}.1')
    for number, stage, index in places(model.depths):
        ours, theirs = f'block{number}', f'features.{2 * stage + 1}.{index}'
        for layer, place in (('depthwise', 0), ('norm', 2), ('expand', 3), ('project', 5)):
            yield Row(f'{ours}/{layer}', f'{theirs}.block.{place}')
        yield Row(f'{ours}/layer_scale', f'{theirs}.layer_scale', layouts.column)
    yield Row('norm', 'classifier.0')
    yield Row('classifier', 'classifier.2')


# timm.


def _timm_stages(depths: Iterable[int]) -> Iterator[Row]:
    """Stem and blocks of the MobileNets and EfficientNets; the first stage expands nothing."""
    yield from conv_bn('stem', 'conv_stem', 'bn1')
    for number, stage, index in places(depths):
        ours, theirs = f'block{number}', f'blocks.{stage}.{index}'
        yield from squeeze(ours, f'{theirs}.se.conv_reduce', f'{theirs}.se.conv_expand')
        convs = (('expand', 'conv_pw'), ('depthwise', 'conv_dw'), ('project', 'conv_pwl'))
        if stage == 0:
            convs = (('depthwise', 'conv_dw'), ('project', 'conv_pw'))
        for place, (layer, conv) in enumerate(convs, start=1):
            yield from conv_bn(f'{ours}/{layer}', f'{theirs}.{conv}', f'{theirs}.bn{place}')
    yield Row('classifier', 'classifier')


def _timm_mobilenet_v1(model: mobilenet_v1.MobileNetV1) -> Iterator[Row]:
    yield from conv_bn('stem', 'conv_stem', 'bn1')
    for number, stage, index in places(repeats for _, repeats in mobilenet_v1.STAGES):
        ours, theirs = f'block{number}', f'blocks.{stage}.{index}'
        yield from conv_bn(f'{ours}_depthwise', f'{theirs}.conv_dw', f'{theirs}.bn1')
        yield from conv_bn(f'{ours}_pointwise', f'{theirs}.conv_pw', f'{theirs}.bn2')
    yield Row('classifier', 'classifier')


def _timm_mobilenet_v2(model: mobilenet.MobileNetV2) -> Iterator[Row]:
    yield from _timm_stages(repeats for *_, repeats in mobilenet.STAGES)
    yield from conv_bn('head', 'conv_head', 'bn2')


def _timm_mobilenet_v3(model: mobilenet_v3.MobileNetV3) -> Iterator[Row]:
    yield from _timm_stages(len(stage.expanded) for stage in model.stages)
    last = f'blocks.{len(model.stages)}.0'
    yield from conv_bn('head', f'{last}.conv', f'{last}.bn1')
    yield Row('hidden', 'conv_head', layouts.dense_window)


def _timm_efficientnet(model: efficientnet.EfficientNet) -> Iterator[Row]:
    yield from _timm_stages(_efficientnet_depths(model))
    yield from conv_bn('head', 'conv_head', 'bn2')


def _timm_vgg(model: vgg.VGG) -> Iterator[Row]:
    yield from _vgg_features(model)
    yield Row('hidden1', 'pre_logits.fc1', layouts.flattened(_last_bias(model), window=True))
    yield Row('hidden2', 'pre_logits.fc2', layouts.dense_window)
    yield Row('classifier', 'head.fc')


def _timm_regnet(model: regnet.RegNetY) -> Iterator[Row]:
    yield from conv_bn('stem', 'stem.conv', 'stem.bn')
    for _, stage, index in places(model.depths):
        ours, theirs = f'stage{stage + 1}_block{index}', f's{stage + 1}.b{index + 1}'
        for layer in ('conv1', 'conv2', 'conv3'):
            here = f'{theirs}.{layer}'
            yield from conv_bn(f'{ours}/{layer}', f'{here}.conv', f'{here}.bn')
        yield from squeeze(ours, f'{theirs}.se.fc1', f'{theirs}.se.fc2')
        here = f'{theirs}.downsample'
        yield from conv_bn(f'{ours}/shortcut', f'{here}.conv', f'{here}.bn')
    yield Row('classifier', 'head.fc')


def _timm_convnext(model: convnext.ConvNeXt) -> Iterator[Row]:
    yield Row('stem', 'stem.0')
    yield Row('stem_norm', 'stem.1')
    for stage in range(1, len(model.depths)):
        yield Row(f'downsample{stage}_norm', f'stages.{stage}.downsample.0')
        yield Row(f'downsample{stage}', f'stages.{stage}.downsample.1')
    for number, stage, index in places(model.depths):
        ours, theirs = f'block{number}', f'stages.{stage}.blocks.{index}'
        yield Row(f'{ours}/depthwise', f'{theirs}.conv_dw')
        yield Row(f'{ours}/norm', f'{theirs}.norm')
        yield Row(f'{ours}/expand', f'{theirs}.mlp.fc1')
        yield Row(f'{ours}/project', f'{theirs}.mlp.fc2')
        yield Row(f'{ours}/layer_scale', f'{theirs}.gamma')
    yield Row('norm', 'head.norm')
    yield Row('classifier', 'head.fc')


# transformers.


def _transformers_mobilenet_v1(model: mobilenet_v1.MobileNetV1) -> Iterator[Row]:
    yield from normalized('stem', 'mobilenet_v1.conv_stem')
    for number in range(sum(repeats for _, repeats in mobilenet_v1.STAGES)):
        for place, layer in enumerate(('depthwise', 'pointwise')):
            theirs = f'mobilenet_v1.layer.{2 * number + place}'
            yield from normalized(f'block{number}_{layer}', theirs)
    yield Row('classifier', 'classifier')


def _transformers_inverted(ours: str, theirs: str) -> Iterator[Row]:
    yield from normalized(f'{ours}/expand', f'{theirs}.expand_1x1')
    yield from normalized(f'{ours}/depthwise', f'{theirs}.conv_3x3')
    yield from normalized(f'{ours}/project', f'{theirs}.reduce_1x1')


def _transformers_mobilenet_v2(model: mobilenet.MobileNetV2) -> Iterator[Row]:
    stem = 'mobilenet_v2.conv_stem'
    yield from normalized('stem', f'{stem}.first_conv')
    for number in range(sum(repeats for *_, repeats in mobilenet.STAGES)):
        theirs = f'mobilenet_v2.layer.{number - 1}' if number else stem
        yield from _transformers_inverted(f'block{number}', theirs)
    yield from normalized('head', 'mobilenet_v2.conv_1x1')
    yield Row('classifier', 'classifier')


def _transformers_efficientnet(model: efficientnet.EfficientNet) -> Iterator[Row]:
    stem, encoder = 'efficientnet.embeddings', 'efficientnet.encoder'
    yield from conv_bn('stem', f'{stem}.convolution', f'{stem}.batchnorm')
    for number in range(sum(_efficientnet_depths(model))):
        ours, theirs = f'block{number}', f'{encoder}.blocks.{number}'
        here = f'{theirs}.expansion.expand'
        yield from conv_bn(f'{ours}/expand', f'{here}_conv', f'{here}_bn')
        here = f'{theirs}.depthwise_conv.depthwise'
        yield from conv_bn(f'{ours}/depthwise', f'{here}_conv', f'{here}_norm')
        here = f'{theirs}.squeeze_excite'
        yield from squeeze(ours, f'{here}.reduce', f'{here}.expand')
        here = f'{theirs}.projection.project'
        yield from conv_bn(f'{ours}/project', f'{here}_conv', f'{here}_bn')
    yield from conv_bn('head', f'{encoder}.top_conv', f'{encoder}.top_bn')
    yield Row('classifier', 'classifier')


def _transformers_resnet(model: resnet.ResNet) -> Iterator[Row]:
    yield from normalized('stem', 'resnet.embedder.embedder')
    for _, stage, index in places(model.depths):
        ours = f'stage{stage + 1}_block{index}'
        theirs = f'resnet.encoder.stages.{stage}.layers.{index}'
        for layer in (1, 2, 3):
            yield from normalized(f'{ours}/conv{layer}', f'{theirs}.layer.{layer - 1}')
        yield from normalized(f'{ours}/shortcut', f'{theirs}.shortcut')
    yield Row('classifier', 'classifier.1')


def _transformers_regnet(model: regnet.RegNetY) -> Iterator[Row]:
    yield from normalized('stem', 'regnet.embedder.embedder')
    for _, stage, index in places(model.depths):
        ours = f'stage{stage + 1}_block{index}'
        theirs = f'regnet.encoder.stages.{stage}.layers.{index}'
        for layer, place in (('conv1', 0), ('conv2', 1), ('conv3', 3)):
            yield from normalized(f'{ours}/{layer}', f'{theirs}.layer.{place}')
        here = f'{theirs}.layer.2.attention'
        yield from squeeze(ours, f'{here}.0', f'{here}.2')
        yield from normalized(f'{ours}/shortcut', f'{theirs}.shortcut')
    yield Row('classifier', 'classifier.1')


def _transformers_convnext(model: convnext.ConvNeXt) -> Iterator[Row]:
    yield Row('stem', 'convnext.embeddings.patch_embeddings')
    yield Row('stem_norm', 'convnext.embeddings.layernorm')
    for stage in range(1, len(model.depths)):
        theirs = f'convnext.encoder.stages.{stage}.downsampling_layer'
        yield Row(f'downsample{stage}_norm', f'{theirs}.0')
        yield Row(f'downsample{stage}', f'{theirs}.1')
    for number, stage, index in places(model.depths):
        ours, theirs = f'block{number}', f'convnext.encoder.stages.{stage}.layers.{index}'
        yield Row(f'{ours}/depthwise', f'{theirs}.dwconv')
        yield Row(f'{ours}/norm', f'{theirs}.layernorm')
        yield Row(f'{ours}/expand', f'{theirs}.pwconv1')
        yield Row(f'{ours}/project', f'{theirs}.pwconv2')
        yield Row(f'{ours}/layer_scale', f'{theirs}.layer_scale_parameter')
    yield Row('norm', 'convnext.layernorm')
    yield Row('classifier', 'classifier')


def _transformers_mobilevit(model: mobilevit.MobileViT) -> Iterator[Row]:
    yield from normalized('stem', 'mobilevit.conv_stem')
    number = itertools.count()
    for stage, (repeats, depth) in enumerate(zip(mobilevit.REPEATS, mobilevit.DEPTHS, strict=True)):
        theirs = f'mobilevit.encoder.layer.{stage}'
        for index in range(repeats):
            block = f'{theirs}.downsampling_layer' if depth else f'{theirs}.layer.{index}'
            yield from _transformers_inverted(f'block{next(number)}', block)
        if depth:
            yield from _transformers_mobilevit_block(f'block{next(number)}', theirs, depth)
    yield from normalized('head', 'mobilevit.conv_1x1_exp')
    yield Row('classifier', 'classifier')


def _transformers_mobilevit_block(ours: str, theirs: str, depth: int) -> Iterator[Row]:
    yield from normalized(f'{ours}/local', f'{theirs}.conv_kxk')
    yield Row(f'{ours}/embed', f'{theirs}.conv_1x1.convolution')
    for index in range(depth):
        own, here = f'{ours}/transformer{index}', f'{theirs}.transformer.layer.{index}'
        yield Row(f'{own}/attention_norm', f'{here}.layernorm_before')
        for part in ('query', 'key', 'value'):
            attention = f'{here}.attention.attention.{part}'
            yield Row(f'{own}/attention/{part}', attention, layouts.into_heads)
        output = f'{here}.attention.output.dense'
        yield Row(f'{own}/attention/out', output, layouts.out_of_heads)
        yield Row(f'{own}/norm', f'{here}.layernorm_after')
        yield Row(f'{own}/expand', f'{here}.intermediate.dense')
        yield Row(f'{own}/project', f'{here}.output.dense')
    yield Row(f'{ours}/norm', f'{theirs}.layernorm')
    yield from normalized(f'{ours}/project', f'{theirs}.conv_projection')
    yield from normalized(f'{ours}/fuse', f'{theirs}.fusion')


# What was trained with TensorFlow, or like it.
TENSORFLOW = {'bn_epsilon': 1e-3, 'padding': 'SAME'}
_TIMM = always({'bn_epsilon': 1e-5}, TENSORFLOW)  # the second are those that it calls tf_…

# The first library is the one that weights are written for, and the one that names which several
# give are taken to be of.
SOURCES: dict[type[nn.Module], dict[str, Source]] = {
    mobilenet_v1.MobileNetV1: {
        'transformers': Source(
            _transformers_mobilenet_v1, always({'activation': 'relu6', **TENSORFLOW})
        ),
        'timm': Source(_timm_mobilenet_v1, always({'activation': 'relu6'})),
    },
    mobilenet.MobileNetV2: {
        'torchvision': Source(_torchvision_mobilenet_v2),
        'timm': Source(_timm_mobilenet_v2),
        'transformers': Source(_transformers_mobilenet_v2, always(TENSORFLOW)),
    },
    mobilenet_v3.MobileNetV3: {
        'torchvision': Source(_torchvision_mobilenet_v3),
        'timm': Source(_timm_mobilenet_v3, _TIMM),
    },
    efficientnet.EfficientNet: {
        'torchvision': Source(_torchvision_efficientnet, _torchvision_efficientnet_settings),
        'timm': Source(_timm_efficientnet, _TIMM),
        'transformers': Source(_transformers_efficientnet, always(TENSORFLOW)),
    },
    resnet.ResNet: {
        'torchvision': Source(_torchvision_resnet),
        'timm': Source(_torchvision_resnet),
        'transformers': Source(_transformers_resnet),
    },
    vgg.VGG: {'torchvision': Source(_torchvision_vgg), 'timm': Source(_timm_vgg)},
    densenet.DenseNet: {
        'torchvision': Source(_torchvision_densenet),
        'timm': Source(_torchvision_densenet),
    },
    regnet.RegNetY: {
        'torchvision': Source(_torchvision_regnet),
        'timm': Source(_timm_regnet),
        'transformers': Source(_transformers_regnet),
    },
    convnext.ConvNeXt: {
        'torchvision': Source(_torchvision_convnext),
        'timm': Source(_timm_convnext),
        'transformers': Source(_transformers_convnext, always({'norm_epsilon': 1e-12})),
    },
    mobilevit.MobileViT: {'transformers': Source(_transformers_mobilevit)},
}
