"""Torch-Pruning's pruners on the images and by the schedule of benchmarks/headline.py.

    PYTHON benchmarks/torch_pruners.py ASKED.json ANSWER.json

PYTHON has torch and torch-pruning. The network is trained on the labels, then with the pruner's own
sparsity term for as long as jaxkd searches, cut step by step until its cost is within the budget,
and trained on for as long as jaxkd distils. Optimizer, schedule and moving average are those of
`jaxkd.train`; what is seen in each step is what jaxkd has written down (headline.write_views).

`torch_pruning` is Torch-Pruning's group norm pruner with its sparse learning (Fang et al. 2023,
DepGraph), `network_slimming` its pruner by the scales of BatchNorm (Liu et al. 2017): importance,
normalization, global ranking and strength are those of its own benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
import copy
import json
import math
import os
import pathlib
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
import torch_networks
import torch_pruning as tp

# Of the sparsity terms, and the share of channels that a layer may lose.
STRENGTH = {'torch_pruning': 5e-4, 'network_slimming': 1e-4}
MOST = 0.9
STEPS = 400


def main(asked: str, answer: str) -> None:
    settings = json.loads(pathlib.Path(asked).read_text())
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(settings['seed'])
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    views = pathlib.Path(settings['images'])
    test = dict(np.load(views / 'test.npz').items())
    height, width, channels = test['images'].shape[1:]
    classes = int(test['labels'].max()) + 1
    example = torch.zeros(1, channels, height, width)
    network = torch_networks.build(settings['network'], channels, classes, **settings['arguments'])
    jax_like(network)
    normalized = normalizer(test, device)

    def on(stage: str, **options: Any) -> nn.Module:
        seen = [
            np.load(views / f'{stage}-{name}.npy', mmap_mode='r') for name in ('images', 'labels')
        ]
        settled = settings['stages'][stage]
        return train(network, normalized, *seen, settled, device, **options)

    start = time.monotonic()
    trained = pathlib.Path(settings['trained'])
    if trained.exists():
        known = torch.load(trained, weights_only=True)
        network.load_state_dict(known['network'])
        spent = known['seconds']
    else:
        network = on('teacher')
        spent = time.monotonic() - start
        torch.save({'network': network.state_dict(), 'seconds': spent}, trained)
        start = time.monotonic()

    full = cost(network, example)
    budget = {name: float(share) * full[name] for name, share in settings['budget'].items()}
    head = [module for module in network.modules() if isinstance(module, nn.Linear)]
    make, importance = {
        'torch_pruning': (
            tp.pruner.GroupNormPruner,
            tp.importance.GroupMagnitudeImportance(p=2, normalizer='max'),
        ),
        'network_slimming': (tp.pruner.BNScalePruner, tp.importance.BNScaleImportance()),
    }[settings['method']]
    network.to('cpu')
    pruner = make(
        network,
        example,
        importance,
        reg=STRENGTH[settings['method']],
        global_pruning=True,
        pruning_ratio=1.0,
        max_pruning_ratio=MOST,
        iterative_steps=STEPS,
        ignored_layers=head,
    )
    # The pruner holds on to the modules, so it is they that are trained, not their average.
    on(
        'search',
        each_epoch=pruner.update_regularizer,
        each_step=lambda: pruner.regularize(network),
        average=False,
    )
    network.to('cpu')
    steps = 0
    while any(cost(network, example)[name] > most for name, most in budget.items()):
        pruner.step()
        steps += 1
        if steps > STEPS:
            raise SystemExit(f'the budget {settings["budget"]} is out of reach')
    reached = cost(network, example)
    network = on('distil')
    found = {
        'accuracy': evaluate(network, normalized, test, device),
        **reached,
        'seconds': spent + time.monotonic() - start,
    }
    pathlib.Path(answer).write_text(json.dumps(found))


def jax_like(network: nn.Module) -> None:
    """Initial weights as jaxkd's networks draw them.

    Convolutions: normal, of variance 2 / outputs (He et al. 2015), where the outputs of a depthwise
    one are all its channels, as Flax counts. Products: normal, of variance 1 / inputs, without
    outliers.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            # Of a normal that is cut at two deviations.
            scale = math.sqrt(1 / module.in_features) / 0.87962566103423978
            nn.init.trunc_normal_(module.weight, std=scale, a=-2 * scale, b=2 * scale)
            nn.init.zeros_(module.bias)


def cost(network: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """Multiply-adds of convolutions and products of one image, and parameters, as jaxkd counts."""
    total = 0

    def count(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        positions = output[0, 0].numel() if output.dim() == 4 else 1
        total += positions * module.weight.numel()

    handles = [
        module.register_forward_hook(count)
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    was = network.training
    network.eval()
    with torch.no_grad():
        network(example.to(next(network.parameters()).device))
    network.train(was)
    for handle in handles:
        handle.remove()
    return {'flops': total, 'params': sum(p.numel() for p in network.parameters())}


def train(
    network: nn.Module,
    normalized: Callable[[torch.Tensor], torch.Tensor],
    images: np.ndarray,
    labels: np.ndarray,
    stage: dict[str, Any],
    device: str,
    *,
    each_epoch: Callable[[], object] = lambda: None,
    each_step: Callable[[], object] = lambda: None,
    average: bool = True,
) -> nn.Module:
    """Trains on the labels; the moving average of the network, or the network itself."""
    network.to(device, memory_format=torch.channels_last).train()
    steps, per_epoch = stage['steps'], stage['steps_per_epoch']
    kernels = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() <= 1]
    groups = [{'params': kernels, 'weight_decay': stage['weight_decay']}, {'params': others}]
    optimizer = torch.optim.SGD(groups, 0.1, momentum=stage['momentum'], nesterov=True)
    averaged = copy.deepcopy(network).eval()
    for step in range(steps):
        if step % per_epoch == 0:
            each_epoch()
        views, right = (torch.from_numpy(part[step].copy()).to(device) for part in (images, labels))
        rate = learning_rate(stage, step, steps, per_epoch)
        for group in optimizer.param_groups:
            group['lr'] = rate
        optimizer.zero_grad(set_to_none=True)
        logits = network(normalized(views.permute(0, 3, 1, 2)))
        functional.cross_entropy(logits, right.long()).backward()
        each_step()
        optimizer.step()
        decay = min(stage['ema_decay'], (1 + step) / (10 + step))
        with torch.no_grad():
            pairs = zip(averaged.state_dict().values(), network.state_dict().values(), strict=True)
            for old, new in pairs:
                if old.is_floating_point():
                    old.lerp_(new, 1 - decay)
    return averaged if average else network


def learning_rate(stage: dict[str, Any], step: int, steps: int, per_epoch: int) -> float:
    """`jaxkd.train.learning_rate`: linear warm-up, then a cosine."""
    warmup = min(round(stage['warmup_epochs'] * per_epoch), steps - 1)
    peak, end = stage['learning_rate'], stage['final_fraction']
    if step < warmup:
        return peak * (1 + step) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress)))


def normalizer(test: dict[str, np.ndarray], device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Makes inputs of images, uint8 [n, channels, height, width], by the training part's mean and
    deviation, which are of pixels in [0, 1]."""
    mean, std = torch.tensor(test['mean']), torch.tensor(test['std'])
    mean, std = (value.reshape(-1, 1, 1).float().to(device) for value in (mean, std))
    return lambda views: (views.float() / 255 - mean) / std


def evaluate(
    network: nn.Module,
    normalized: Callable[[torch.Tensor], torch.Tensor],
    test: dict[str, np.ndarray],
    device: str,
) -> float:
    """Accuracy on the test part."""
    network = copy.deepcopy(network).to(device).eval()
    right = 0
    labels = torch.from_numpy(test['labels']).long()
    for start in range(0, len(labels), 500):
        part = torch.from_numpy(test['images'][start : start + 500]).permute(0, 3, 1, 2)
        with torch.inference_mode():
            logits = network(normalized(part.to(device)))
        right += int((logits.argmax(1).cpu() == labels[start : start + 500]).sum())
    return right / len(labels)


if __name__ == '__main__':
    main(*sys.argv[1:])
