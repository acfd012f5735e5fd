"""Distillation losses: pure functions of logits, one value per example."""

from __future__ import annotations

import chex
import jax
import optax


def hinton(
    student: jax.Array, teacher: jax.Array, temperature: float | jax.Array = 4.0
) -> jax.Array:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), for each example.

    The factor T² keeps the size of the gradient when the temperature changes. No gradient flows to
    the teacher.

    Args:
      student: logits, float [..., classes].
      teacher: logits of the same shape.
      temperature: T > 0; the larger, the more the small probabilities count.

    Returns:
      float [...].

    References:
      Hinton, Vinyals, Dean 2015, Distilling the Knowledge in a Neural Network,
      https://arxiv.org/abs/1503.02531, section 2.
    """
    chex.assert_type([student, teacher], float)
    chex.assert_equal_shape([student, teacher])
    log_student = jax.nn.log_softmax(student / temperature)
    log_teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / temperature)
    return temperature**2 * optax.losses.kl_divergence_with_log_targets(log_student, log_teacher)


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
    hard = optax.softmax_cross_entropy_with_integer_labels(student, labels)
    return (1 - alpha) * hard + alpha * hinton(student, teacher, temperature)
