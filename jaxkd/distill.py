"""Distillation losses: pure functions of logits or features, one value per example.

Values are what their papers minimize once the mean over the examples is taken. Some of these are
defined on a batch as a whole, and then what is not the example's own is in every example's value.
No gradient flows to the teacher. Half precision is computed with in float32, and values are that.

Which of them a run takes, with what weights, says its config; see `jaxkd.objective`.
"""

from __future__ import annotations

from collections.abc import Mapping
import math

import chex
import jax
import jax.numpy as jnp
import optax

# Squared lengths below this count as this: vectors of zeros get gradients that are numbers.
SMALLEST = 1e-12


def hinton(
    student: jax.Array, teacher: jax.Array, temperature: float | jax.Array = 4.0
) -> jax.Array:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), for each example.

    The factor T² keeps the size of the gradient when the temperature changes. No gradient flows to
    the teacher.

    Args:
      student: logits, float [..., classes].
      teacher: logits of the same shape.
      temperature: T > 0; the larger, the more the small probabilities count. Up to about 100:
        the divergence goes as 1 / T², and far beyond is lost in the rounding of float32.

    Returns:
      float [...].

    References:
      Hinton, Vinyals, Dean 2015, Distilling the Knowledge in a Neural Network,
      https://arxiv.org/abs/1503.02531, section 2.
    """
    student, teacher = _alike(student, teacher)
    log_student = jax.nn.log_softmax(student / temperature)
    log_teacher = jax.nn.log_softmax(teacher / temperature)
    return temperature**2 * _divergence(log_student, log_teacher)


def distillation(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array,
    *,
    alpha: float = 0.9,
    temperature: float = 4.0,
) -> jax.Array:
    """(1 - α) · cross-entropy + α · `hinton`, for each example.

    Args:
      student, teacher: logits, float [..., classes].
      labels: classes, int [...].
      alpha: weight of the teacher's soft targets, in [0, 1].
      temperature: see `hinton`.

    Returns:
      float [...].
    """
    hard = optax.softmax_cross_entropy_with_integer_labels(_wide(student), labels)
    return (1 - alpha) * hard + alpha * hinton(student, teacher, temperature)


def dkd(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> jax.Array:
    """Decoupled distillation: T² · (α · TCKD + β · NCKD), for each example.

    TCKD is the divergence between (p, 1 - p), where p is the probability of the label, and NCKD
    that between the distributions over the other classes. `hinton` is α = 1 with β = 1 - p of the
    teacher: where it is sure, it hardly says how the others compare.

    Args:
      student: logits, float [..., classes].
      teacher: logits of the same shape.
      labels: classes, int [...].
      alpha, beta: the weights.
      temperature: see `hinton`.

    Returns:
      float [...].

    Raises:
      AssertionError: for other types or shapes.

    References:
      Zhao, Cui, Song, Qiu, Liang 2022, Decoupled Knowledge Distillation,
      https://arxiv.org/abs/2203.08679, equation 7; times T², as in the authors' code.
    """
    student, teacher = _alike(student, teacher)
    chex.assert_type(labels, int)
    chex.assert_shape(labels, student.shape[:-1])
    target = jax.nn.one_hot(labels, student.shape[-1], dtype=bool)

    def parts(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities: of (label, not the label) and among the classes that it is not."""
        logits = logits / temperature
        whole = jax.nn.logsumexp(logits, axis=-1)
        # Finite, so that 0 · (what is left of it) is 0.
        others = jnp.where(target, jnp.finfo(logits.dtype).min / 2, logits)
        rest = jax.nn.logsumexp(others, axis=-1)
        own = jnp.sum(jnp.where(target, logits, 0), axis=-1)
        return jnp.stack([own - whole, rest - whole], axis=-1), jax.nn.log_softmax(others)

    divergences = [
        _divergence(of_student, of_teacher)
        for of_student, of_teacher in zip(parts(student), parts(teacher), strict=True)
    ]
    return temperature**2 * (alpha * divergences[0] + beta * divergences[1])


def dist(
    student: jax.Array,
    teacher: jax.Array,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> jax.Array:
    """T² · (β · inter-class + γ · intra-class), each 1 - Pearson's correlation of probabilities.

    The inter-class relation of an example is between the student's and the teacher's
    probabilities of the classes. The intra-class relation of a class is between those of the
    examples, so that it depends on the batch; its mean over the classes is in each example's value.
    In a batch of one nothing is related, and it is 1 without gradient.

    Args:
      student: logits, float [batch, classes].
      teacher: logits of the same shape.
      beta, gamma: the weights.
      temperature: T > 0.

    Returns:
      float [batch].

    Raises:
      AssertionError: for other types or shapes.

    References:
      Huang, You, Wang, Qian, Xu 2022, Knowledge Distillation from A Stronger Teacher,
      https://arxiv.org/abs/2205.10536, equations 8 to 10; times T², as in the authors' code.
    """
    chex.assert_rank([student, teacher], 2)
    student, teacher = _alike(student, teacher)
    of_student, of_teacher = (jax.nn.softmax(z / temperature) for z in (student, teacher))
    inter = 1 - _correlation(of_student, of_teacher)
    intra = jnp.mean(1 - _correlation(of_student.T, of_teacher.T))
    return temperature**2 * (beta * inter + gamma * intra)


def standardized(logits: jax.Array) -> jax.Array:
    """Logits with mean 0 and standard deviation 1 over the classes.

    With them the student need not match the size of the teacher's logits, only their relations:
    `hinton(standardized(student), standardized(teacher), 2.0)`. Any loss of logits takes them.

    Args:
      logits: float [..., classes].

    Returns:
      float [..., classes].

    References:
      Sun, Ren, Li, Wang, Cao 2024, Logit Standardization in Knowledge Distillation,
      https://arxiv.org/abs/2403.01427, algorithm 1.
    """
    chex.assert_type(logits, float)
    return math.sqrt(logits.shape[-1]) * _unit(_centred(_wide(logits)))


def logit_mse(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """The mean over the classes of the squared difference of logits, for each example.

    Args:
      student: logits, float [..., classes].
      teacher: logits of the same shape.

    Returns:
      float [...].

    References:
      Ba, Caruana 2014, Do Deep Nets Really Need to be Deep?, https://arxiv.org/abs/1312.6184,
      equation 1 (half the sum over the classes).
      Kim, Oh, Kim, Cho, Yun 2021, Comparing Kullback-Leibler Divergence and Mean Squared Error Loss
      in Knowledge Distillation, https://arxiv.org/abs/2105.08919, equation 3.
    """
    student, teacher = _alike(student, teacher)
    return jnp.mean((student - teacher) ** 2, axis=-1)


def hard_label(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """The cross-entropy with the class that the teacher answers, for each example.

    Args:
      student: logits, float [..., classes].
      teacher: logits of the same shape.

    Returns:
      float [...].

    References:
      Touvron et al. 2021, Training data-efficient image transformers & distillation through
      attention (DeiT), https://arxiv.org/abs/2012.12877, equation 3 (with the weights ½ and ½ for
      this and the labels).
    """
    student, teacher = _alike(student, teacher)
    return optax.softmax_cross_entropy_with_integer_labels(student, jnp.argmax(teacher, axis=-1))


def fitnet(
    student: jax.Array, teacher: jax.Array, adapter: Mapping[str, jax.Array] | None = None
) -> jax.Array:
    """The mean squared difference of features (a hint), for each example.

    Args:
      student: features, float [batch, ..., student's channels].
      teacher: features, float [batch, ..., teacher's channels], elsewhere of the same shape.
      adapter: 'kernel', float [student's channels, teacher's channels], and 'bias', float
        [teacher's channels], of a 1×1 convolution that makes the teacher's channels of the
        student's; needed where their numbers differ.

    Returns:
      float [batch].

    Raises:
      AssertionError: for other types or shapes.

    References:
      Romero et al. 2015, FitNets: Hints for Thin Deep Nets, https://arxiv.org/abs/1412.6550,
      equation 3 (half the sum over positions and channels).
    """
    chex.assert_type([student, teacher], float)
    if adapter is not None:
        student = _wide(student) @ adapter['kernel'] + adapter['bias']
    student, teacher = _alike(student, teacher)
    return jnp.mean(_flat((student - teacher) ** 2), axis=-1)


def attention_transfer(student: jax.Array, teacher: jax.Array, *, power: float = 2.0) -> jax.Array:
    """The mean squared difference of attention maps, for each example.

    The attention map of features is Σ_channels |feature|^p at each position, as a vector of
    length 1. The numbers of channels may differ.

    Args:
      student: features, float [batch, *positions, student's channels].
      teacher: features, float [batch, *positions, teacher's channels].
      power: p ≥ 1; the larger, the more the strongest feature of a position counts.

    Returns:
      float [batch].

    Raises:
      AssertionError: for other types or shapes.

    References:
      Zagoruyko, Komodakis 2017, Paying More Attention to Attention, https://arxiv.org/abs/1612.03928,
      equation 2, with the squared distance and its mean over positions, as in the authors' code
      (which weighs it by 1000).
    """
    chex.assert_type([student, teacher], float)
    chex.assert_equal_shape_prefix([student, teacher], student.ndim - 1)

    def attention(features: jax.Array) -> jax.Array:
        return _unit(_flat(jnp.sum(jnp.abs(_wide(features)) ** power, axis=-1)))

    difference = attention(student) - attention(jax.lax.stop_gradient(teacher))
    return jnp.mean(difference**2, axis=-1)


def similarity_preserving(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """The mean squared difference of the similarities to the batch's examples, for each example.

    The similarities of an example are the scalar products of its features with those of every
    example of the batch, as a vector of length 1. Only the batches have to agree in shape.

    Args:
      student: features, float [batch, ...].
      teacher: features, float [batch, ...].

    Returns:
      float [batch].

    Raises:
      AssertionError: for other types or shapes.

    References:
      Tung, Mori 2019, Similarity-Preserving Knowledge Distillation,
      https://arxiv.org/abs/1907.09682, equations 1 to 4.
    """
    chex.assert_type([student, teacher], float)
    chex.assert_equal_shape_prefix([student, teacher], 1)

    def similarities(features: jax.Array) -> jax.Array:
        features = _flat(_wide(features))
        return _unit(features @ features.T)

    difference = similarities(student) - similarities(jax.lax.stop_gradient(teacher))
    return jnp.mean(difference**2, axis=-1)


def _alike(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a loss computes with, if both are floats of one shape; else AssertionError."""
    chex.assert_type([student, teacher], float)
    chex.assert_equal_shape([student, teacher])
    return _wide(student), _wide(jax.lax.stop_gradient(teacher))


def _wide(array: jax.Array) -> jax.Array:
    """In float32 at least: in float16, `SMALLEST` and many a probability are 0."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _divergence(log_student: jax.Array, log_teacher: jax.Array) -> jax.Array:
    """KL(teacher ‖ student) of log-probabilities along the last axis.

    A class that the teacher masks with -inf adds nothing, whatever the student gives it.
    """
    masked = jnp.isneginf(log_teacher)
    log_student, log_teacher = (jnp.where(masked, 0, log) for log in (log_student, log_teacher))
    return optax.losses.kl_divergence_with_log_targets(log_student, log_teacher)


def _flat(array: jax.Array) -> jax.Array:
    """[batch, ...] as [batch, n]."""
    return array.reshape(len(array), -1)


def _centred(vectors: jax.Array) -> jax.Array:
    return vectors - jnp.mean(vectors, axis=-1, keepdims=True)


def _unit(vectors: jax.Array) -> jax.Array:
    """Vectors along the last axis, of length 1, or shorter where they are as good as zero."""
    squared = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squared, SMALLEST))


def _correlation(a: jax.Array, b: jax.Array) -> jax.Array:
    """Pearson's of probabilities, along the last axis."""
    return jnp.sum(_unit(_centred(_relative(a))) * _unit(_centred(_relative(b))), axis=-1)


def _relative(probabilities: jax.Array) -> jax.Array:
    """To the largest along the last axis: a class that is rare everywhere is as good as any."""
    largest = jnp.max(probabilities, axis=-1, keepdims=True)
    return probabilities / jax.lax.stop_gradient(jnp.maximum(largest, 1e-30))
