"""Training steps: jitted, donated, on a mesh of all devices."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import sharding
import jax.numpy as jnp
import numpy as np
import optax

from jaxkd import cpu, data, features, mode, precision
from jaxkd import mesh as meshes

Loss = Callable[[jax.Array, jax.Array | None, jax.Array], jax.Array]
# Batches on their way to the device while one is computed with.
AHEAD = 1
# The teacher of a network that is taught by its own moving average (Tarvainen, Valpola 2017, Mean
# teachers are better role models, https://arxiv.org/abs/1703.01780).
AVERAGE = 'average'
# (trained parameters, key in training or None) → the parameters that the model is applied to.
Fold = Callable[[Any, jax.Array | None], Any]


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
      step: int32 [], steps done.
      params, batch_stats: the network's variables, nested dicts.
      opt_state: the optimizer's.
      ema: {'params', 'batch_stats'}: exponential moving averages of the variables.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any


class Objective(NamedTuple):
    """A loss that reads more than logits, or changes from step to step.

    Attributes:
      loss: (student's outputs, teacher's outputs or None, labels, adapters, steps done) → float
        [batch]. The adapters are an entry of the trained parameters; see `jaxkd.features`.
      wanted: which features it reads, by the paths of their modules; None for none.
    """

    loss: Callable[..., jax.Array]
    wanted: features.Wanted | None = None


class Examples(NamedTuple):
    """A part of a data set, ready for steps.

    Attributes:
      images: uint8 [size, height, width, channels] on the device, or None for a part that does
        not fit there and is fetched batch by batch.
      labels: int32 [size] on the device.
      split: where they come from.
    """

    images: jax.Array | None
    labels: jax.Array
    split: data.Split


class Preprocessing(NamedTuple):
    """How images become inputs.

    Attributes:
      mean, std: float32 [channels], of pixels in [0, 1].
      padding: pixels of zeros around the image that a random crop is taken from, in training.
      flip: whether to mirror at random, in training.
      augmentation: what else is done to images, in training.
    """

    mean: np.ndarray
    std: np.ndarray
    padding: int
    flip: bool
    augmentation: data.Augmentation = data.Augmentation()


def put(split: data.Split, mesh: sharding.Mesh) -> Examples:
    """A split on the devices, its images too if they are in memory."""
    images = None if split.images is None else meshes.replicate(split.images, mesh)
    return Examples(images, meshes.replicate(split.labels, mesh), split)


def learning_rate(config: Mapping[str, Any], steps: int, steps_per_epoch: int) -> optax.Schedule:
    """Cosine decay to `final_fraction` of the peak, after a linear warm-up.

    Args:
      config: `learning_rate` (the peak), `warmup_epochs`, `final_fraction`.
      steps: length of the stage.
      steps_per_epoch: steps in an epoch.
    """
    warmup = min(round(config['warmup_epochs'] * steps_per_epoch), steps - 1)
    peak = config['learning_rate']
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / (warmup + 1),
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=peak * config['final_fraction'],
    )


def optimizer(
    config: Mapping[str, Any], schedule: optax.Schedule, *after: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """SGD with Nesterov momentum; weight decay on kernels alone; then what comes `after`."""
    return optax.chain(
        optax.add_decayed_weights(
            config['weight_decay'], mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
        ),
        optax.sgd(schedule, momentum=config['momentum'], nesterov=True),
        *after,
    )


def create_state(variables: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step. `variables` are copied: steps donate their state."""
    params = jax.tree.map(jnp.array, variables['params'])
    batch_stats = jax.tree.map(jnp.array, variables.get('batch_stats', {}))
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.array, {'params': params, 'batch_stats': batch_stats}),
    )


def variables(state: TrainState) -> dict[str, Any]:
    """The variables that a state trains."""
    return _variables(state.params, state.batch_stats)


def averaged(state: TrainState) -> dict[str, Any]:
    """The moving averages of the variables."""
    return _variables(state.ema['params'], state.ema['batch_stats'])


def _variables(params: Any, batch_stats: Any) -> dict[str, Any]:
    return {'params': params} | ({'batch_stats': batch_stats} if batch_stats else {})


def hard_loss(label_smoothing: float) -> Loss:
    """Cross-entropy with the labels, for each example."""

    def loss(logits, teacher_logits, labels):
        del teacher_logits
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
        return optax.softmax_cross_entropy(logits, targets)

    return loss


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformationExtraArgs,
    loss: Loss | Objective,
    preprocessing: Preprocessing,
    mesh: sharding.Mesh,
    *,
    seed: int,
    ema_decay: float,
    teacher: nn.Module | str | None = None,
    fold: Fold | None = None,
    accumulate: int = 1,
    compute_dtype: str = 'float32',
    layout: Any = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """A step `(state, batch, teacher_variables, extra) -> state, metrics`.

    `batch` is what `batches` yields. `teacher_variables` are {} without a teacher, and a tuple for
    several, whose mean logits count; the teacher runs in eval mode and sees the student's view.
    With `AVERAGE` for the teacher it is the model with the averages of its own variables.
    `extra` are further arguments of `tx.update`.
    `fold` makes the parameters that the model sees of those that are trained.
    Metrics are float32 []: the batch's mean loss and accuracy, where an answer to a mixed image is
    right by the share of the image that it names; of an `Objective` also the cross-entropy with the
    labels. The state is donated.

    The batch is sharded over the mesh, so that BatchNorm statistics and gradients are those of the
    whole batch, however many devices there are. `layout` is where the state lies (see
    `jaxkd.mesh.shardings`), everywhere by default.

    With `accumulate` above 1 the batch is computed in so many parts, one after the other, and the
    mean of their gradients is taken. Then BatchNorm normalizes each part by its own statistics, and
    the running ones move with each part. Every part has random keys of its own.

    Both networks compute in `compute_dtype` (see `jaxkd.precision`); logits, loss, parameters,
    statistics and the optimizer's state are float32.
    """
    everywhere, split = meshes.everywhere(mesh), meshes.along_batch(mesh)
    plain = not isinstance(loss, Objective)
    objective = _of_logits(loss) if plain else loss

    def step(state, batch, teacher_variables, extra):
        images, labels = _gather(batch, split)
        view_key, dropout_key = _keys(seed, state.step)
        views, share = _views(view_key, images, preprocessing)
        # Of a mixed image what its two halves show, and how much of it the first one is.
        shown = (labels,) if share is None else (labels, data.partners(labels), share)

        def learn_from(batch_stats, views, shown, key):
            """Gradients of the mean loss, new statistics and metrics."""
            inputs = data.normalize(views, preprocessing.mean, preprocessing.std)
            inputs = inputs.astype(compute_dtype)
            with precision.computing(compute_dtype), cpu.fast_layers():
                taught = None
                if teacher == AVERAGE:
                    own = fold(state.ema['params'], None) if fold else state.ema['params']
                    own = _variables(own, state.ema['batch_stats'])
                    taught = features.taught(model, own, inputs, objective.wanted)
                elif teacher:
                    taught = features.taught(teacher, teacher_variables, inputs, objective.wanted)

                def mean(params):
                    adapters = params.get(features.ADAPTERS, {})
                    if fold:
                        params = fold(params, jax.random.fold_in(key, 0))
                    said, new = features.outputs(
                        model,
                        _variables(params, batch_stats),
                        inputs,
                        objective.wanted,
                        train=True,
                        mutable=['batch_stats'],
                        rngs=_random(key),
                    )
                    value = _shared(
                        lambda labels: objective.loss(said, taught, labels, adapters, state.step),
                        *shown,
                    )
                    return jnp.mean(value), (said.logits, new)

                grad = jax.value_and_grad(mean, has_aux=True)
                (value, (logits, new)), gradients = grad(state.params)
            right = _shared(lambda labels: jnp.argmax(logits, -1) == labels, *shown)
            metrics = {'loss': value, 'accuracy': jnp.mean(right, dtype=jnp.float32)}
            if not plain:
                hard = functools.partial(optax.softmax_cross_entropy_with_integer_labels, logits)
                metrics['cross_entropy'] = jnp.mean(_shared(hard, *shown))
            return gradients, new.get('batch_stats', {}), metrics

        if accumulate == 1:
            found = learn_from(state.batch_stats, views, shown, dropout_key)
        else:
            parts = jax.tree.map(lambda array: _parts(array, accumulate, mesh), (views, shown))
            keys = jax.random.split(dropout_key, accumulate)
            found = _in_turn(learn_from, state.batch_stats, (*parts, keys))
        gradients, batch_stats, metrics = found
        updates, opt_state = tx.update(gradients, state.opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        # A short memory at first: the average of the first steps would be that of random weights.
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(
            lambda old, new: old + (1 - decay) * (new - old),
            state.ema,
            {'params': params, 'batch_stats': batch_stats},
        )
        return TrainState(state.step + 1, params, batch_stats, opt_state, ema), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(layout or everywhere, everywhere))


def training_views(
    seed: int, step: jax.Array, images: jax.Array, preprocessing: Preprocessing
) -> tuple[jax.Array, jax.Array | None]:
    """What a step shows the networks of a batch's images, before they are normalized.

    Args:
      seed: that of the step; see `make_train_step`.
      step: int32 [], steps done.
      images: uint8 [batch, height, width, channels].
      preprocessing: what is done to them.

    Returns:
      See `jaxkd.data.vary`.
    """
    return _views(_keys(seed, step)[0], images, preprocessing)


def _keys(seed: int, step: jax.Array) -> jax.Array:
    """Of views, and of dropout."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), step))


def _views(
    key: jax.Array, images: jax.Array, preprocessing: Preprocessing
) -> tuple[jax.Array, jax.Array | None]:
    views = data.augment(key, images, padding=preprocessing.padding, flip=preprocessing.flip)
    # 0 and 1 would be the keys that `augment` splits its own into.
    return data.vary(jax.random.fold_in(key, 2), views, preprocessing.augmentation)


def _of_logits(loss: Loss) -> Objective:
    def of(student, teacher, labels, adapters, step):
        del adapters, step
        return loss(student.logits, teacher and teacher.logits, labels)

    return Objective(of)


def _parts(array: jax.Array, number: int, mesh: sharding.Mesh) -> jax.Array:
    """[batch, …] as [number, batch / number, …].

    Each part has rows of every device, those that it has already.
    """
    parts = array.reshape(-1, number, *array.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(parts, meshes.along_batch(mesh, axis=1))


def _in_turn(
    learn_from: Callable[..., tuple[Any, Any, Any]], batch_stats: Any, parts: tuple[Any, ...]
) -> tuple[Any, Any, Any]:
    """Mean gradients, last statistics and mean metrics of the parts of a batch."""

    def add(carry, part):
        batch_stats, sums = carry
        gradients, batch_stats, metrics = learn_from(batch_stats, *part)
        return (batch_stats, jax.tree.map(jnp.add, sums, (gradients, metrics))), None

    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), parts)
    gradients, _, metrics = jax.eval_shape(learn_from, batch_stats, *first)
    sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (gradients, metrics))
    (batch_stats, sums), _ = jax.lax.scan(add, (batch_stats, sums), parts)
    number = len(jax.tree.leaves(parts)[0])
    gradients, metrics = jax.tree.map(lambda total: total / number, sums)
    return gradients, batch_stats, metrics


def _shared(
    value: Callable[[jax.Array], jax.Array],
    labels: jax.Array,
    others: jax.Array | None = None,
    share: jax.Array | None = None,
) -> jax.Array:
    """`value(labels)` for each example; of mixed ones that of both labels, by their shares.

    For cross-entropy this is that with the mixture of the labels, in which it is linear.
    """
    if others is None:
        return value(labels)
    return share * value(labels) + (1 - share) * value(others)


def make_eval_step(
    model: nn.Module, preprocessing: Preprocessing, mesh: sharding.Mesh
) -> Callable[..., jax.Array]:
    """A step `(variables, batch, valid) -> float32 [2]`: right answers and summed cross-entropy.

    `valid` is bool [batch]: which examples count. With a tuple of the variables of several networks
    it is their mean logits that answer.
    """

    def step(variables, batch, valid):
        logits, labels = _logits(model, variables, batch, preprocessing, mesh)
        right = jnp.argmax(logits, -1) == labels
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.stack([jnp.sum(right & valid), jnp.sum(jnp.where(valid, losses, 0.0))])

    return jax.jit(step, out_shardings=meshes.everywhere(mesh))


def make_predict_step(
    model: nn.Module, preprocessing: Preprocessing, mesh: sharding.Mesh
) -> Callable[..., jax.Array]:
    """A step `(variables, batch) -> int32 [batch]`: the classes that a network answers with.

    With a tuple of the variables of several networks it is their mean logits that answer.
    """

    def step(variables, batch):
        logits, _ = _logits(model, variables, batch, preprocessing, mesh)
        return jnp.argmax(logits, -1)

    return jax.jit(step, out_shardings=meshes.everywhere(mesh))


def make_loss(
    model: nn.Module, preprocessing: Preprocessing, mesh: sharding.Mesh
) -> Callable[..., jax.Array]:
    """The mean cross-entropy `(variables, batch) -> float32 []` of a network in eval mode."""

    def loss(variables, batch):
        logits, labels = _logits(model, variables, batch, preprocessing, mesh)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


def _logits(
    model: nn.Module,
    variables: Any,
    batch: Mapping[str, jax.Array],
    preprocessing: Preprocessing,
    mesh: sharding.Mesh,
) -> tuple[jax.Array, jax.Array]:
    """Logits in eval mode, float32 [batch, classes], and labels."""
    images, labels = _gather(batch, meshes.along_batch(mesh))
    inputs = data.normalize(images, preprocessing.mean, preprocessing.std)
    with cpu.fast_layers():
        return features.taught(model, variables, inputs).logits, labels


def recalibrate(
    model: nn.Module,
    variables: Any,
    examples: Examples,
    preprocessing: Preprocessing,
    mesh: sharding.Mesh,
    *,
    batch_size: int,
    steps: int,
    compute_dtype: str = 'float32',
) -> Any:
    """The variables with running statistics that `steps` batches have moved, as training does.

    Without augmentation: with the inputs of evaluation.
    """
    split = meshes.along_batch(mesh)

    @functools.partial(jax.jit, out_shardings=meshes.everywhere(mesh))
    def step(variables, batch):
        images, _ = _gather(batch, split)
        inputs = data.normalize(images, preprocessing.mean, preprocessing.std)
        inputs = inputs.astype(compute_dtype)
        with precision.computing(compute_dtype), cpu.fast_layers():
            _, new = model.apply(
                variables,
                inputs,
                mutable=['batch_stats'],
                rngs=_random(jax.random.key(0)),
                **mode.arguments(model, train=True),
            )
        return {**variables, **new}

    variables = meshes.place(variables, variables['params'], mesh)
    for batch in batches(examples, batch_size, mesh, seed=0, start=0, stop=steps):
        variables = step(variables, batch)
    return meshes.gathered(variables)


def _random(key: jax.Array) -> dict[str, jax.Array]:
    """Keys for a model in training: that of 'params' serves whatever streams it has of its own."""
    return {'dropout': key, 'params': jax.random.fold_in(key, 1)}


def _gather(batch: Mapping[str, jax.Array], split: sharding.Sharding) -> tuple[Any, Any]:
    """Images and labels of a batch, each device its part."""
    images, labels = batch['images'], batch['labels']
    if 'indices' in batch:
        images, labels = images[batch['indices']], labels[batch['indices']]
    images = jax.lax.with_sharding_constraint(images, split)
    return images, jax.lax.with_sharding_constraint(labels, split)


def make_batch(
    examples: Examples, indices: np.ndarray, mesh: sharding.Mesh, images: np.ndarray | None = None
) -> dict[str, jax.Array]:
    """The batch of the examples `indices`: gathered on the device if the images are there.

    Otherwise they are `images`, or fetched as evaluation sees them. Of several processes each has,
    or fetches, the rows of its own devices alone.
    """
    own = indices[meshes.own_rows(len(indices), mesh)]
    put = functools.partial(meshes.assembled, size=len(indices), mesh=mesh)
    if examples.images is not None:
        return {'images': examples.images, 'labels': examples.labels, 'indices': put(own)}
    if images is None:
        images = examples.split.fetch(own)
    return {'images': put(images), 'labels': put(examples.split.labels[own])}


def batches(
    examples: Examples,
    batch_size: int,
    mesh: sharding.Mesh,
    *,
    seed: int,
    start: int,
    stop: int,
    crops: bool = False,
) -> Iterator[dict[str, jax.Array]]:
    """The batches of the steps from `start` to `stop`: a function of the seed and the step.

    With `crops`, images that are decoded when they are asked for are seen as in training, and are
    read ahead; see `data.load`.
    """
    steps = data.Steps(examples.split.size, batch_size, seed, start, stop)
    if not crops or examples.split.files is None:
        for _, indices in steps:
            yield make_batch(examples, indices, mesh)
        return
    own = dataclasses.replace(steps, rows=meshes.own_rows(batch_size, mesh))
    with contextlib.closing(data.read_ahead(examples.split.files, own, seed=seed)) as images:
        ahead = collections.deque()
        for (_, indices), read in zip(steps, images, strict=True):
            ahead.append(make_batch(examples, indices, mesh, read))
            if len(ahead) > AHEAD:
                yield ahead.popleft()
        yield from ahead


def steps_per_epoch(size: int, batch_size: int) -> int:
    """Whole batches in one epoch; ConfigError if there is none."""
    return len(data.epoch_order(size, batch_size, seed=0, epoch=0))


def evaluate(
    step: Callable[..., jax.Array],
    variables: Any,
    examples: Examples,
    batch_size: int,
    mesh: sharding.Mesh,
) -> dict[str, float]:
    """Accuracy, in [0, 1], and mean cross-entropy on all examples. `step` is an eval step."""
    totals = [
        step(variables, make_batch(examples, indices, mesh), valid)
        for indices, valid in data.eval_batches(examples.split.size, batch_size)
    ]
    right, loss = np.sum(jax.device_get(totals), axis=0, dtype=np.float64)
    size = examples.split.size
    return {'accuracy': float(right / size), 'loss': float(loss / size)}


def predict(
    step: Callable[..., jax.Array],
    variables: Any,
    examples: Examples,
    batch_size: int,
    mesh: sharding.Mesh,
) -> np.ndarray:
    """The class that a network answers with for each example: int [size]. `step` predicts."""
    batches = data.eval_batches(examples.split.size, batch_size)
    found = [step(variables, make_batch(examples, indices, mesh)) for indices, _ in batches]
    return np.concatenate(jax.device_get(found))[: examples.split.size]
