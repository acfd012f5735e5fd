"""Distillation losses against values computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill

# softmax(0, 0) = (½, ½) and softmax(0, ln 3) = (¼, ¾), so
# KL(½, ½ ‖ ¼, ¾) = ½ ln 2 + ½ ln ⅔ = ½ ln 4/3.
TEACHER = jnp.array([[0.0, 0.0], [0.0, 0.0]])
STUDENT = jnp.array([[0.0, np.log(3.0)], [0.0, 0.0]])


def test_hinton_by_hand():
    np.testing.assert_allclose(
        distill.hinton(STUDENT, TEACHER, 1.0), [0.5 * np.log(4 / 3), 0.0], atol=1e-6
    )
    # Logits twice as large at twice the temperature: the same divergence, times T² = 4.
    np.testing.assert_allclose(
        distill.hinton(2 * STUDENT, TEACHER, 2.0), [2 * np.log(4 / 3), 0.0], atol=1e-6
    )


def test_distillation_mixes_labels_and_teacher():
    """Cross-entropy with class 0: -ln ¼ and -ln ½."""
    labels = jnp.array([0, 0])
    loss = distill.distillation(STUDENT, TEACHER, labels, alpha=0.25, temperature=1.0)
    expected = [0.75 * np.log(4) + 0.125 * np.log(4 / 3), 0.75 * np.log(2)]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_no_gradient_flows_to_the_teacher():
    gradient = jax.grad(lambda s, t: distill.hinton(s, t).sum(), argnums=(0, 1))(STUDENT, TEACHER)
    assert np.any(gradient[0]) and not np.any(gradient[1])


def test_gradient_keeps_its_size_when_the_temperature_changes():
    """For T → ∞ the gradient tends to (s - t) / classes for centred logits (Hinton, eq. 4)."""
    student, teacher = jnp.array([[0.3, -0.3]]), jnp.array([[-0.2, 0.2]])
    gradient = jax.grad(lambda s: distill.hinton(s, teacher, 100.0).sum())(student)
    np.testing.assert_allclose(gradient, (student - teacher) / 2, rtol=1e-2)


def test_logits_of_different_classes_are_refused():
    with pytest.raises(AssertionError):
        distill.hinton(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
