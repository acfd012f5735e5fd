"""Distillation losses against values computed by hand, and against their formulas in float64."""

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


def test_gradient_keeps_its_size_when_the_temperature_changes():
    """For T → ∞ the gradient tends to (s - t) / classes for centred logits (Hinton, eq. 4)."""
    student, teacher = jnp.array([[0.3, -0.3]]), jnp.array([[-0.2, 0.2]])
    gradient = jax.grad(lambda s: distill.hinton(s, teacher, 100.0).sum())(student)
    np.testing.assert_allclose(gradient, (student - teacher) / 2, rtol=1e-2)


def test_logits_of_different_classes_are_refused():
    with pytest.raises(AssertionError):
        distill.hinton(jnp.zeros((2, 3)), jnp.zeros((2, 4)))


# What each loss is given: of random networks, with other numbers of channels where they may differ.
LOGITS = 3 * np.random.default_rng(0).normal(size=(2, 6, 5))
LABELS = np.array([0, 4, 2, 2, 1, 3])
FEATURES = [np.random.default_rng(c).normal(size=(6, 2, 3, c)) for c in (4, 7)]
ADAPTER = {
    'kernel': np.random.default_rng(1).normal(size=(4, 7)),
    'bias': np.random.default_rng(2).normal(size=7),
}


def _softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _kl(p, q):
    return np.sum(p * np.log(p / q), axis=-1)


def _hinton(s, t):
    return 9.0 * _kl(_softmax(t / 3.0), _softmax(s / 3.0))


def _dkd(s, t):
    """Zhao 2022, from probabilities, one example after the other."""
    losses = []
    for student, teacher, label in zip(_softmax(s / 3.0), _softmax(t / 3.0), LABELS):
        binary = [np.array([p[label], 1 - p[label]]) for p in (teacher, student)]
        others = [np.delete(p, label) / (1 - p[label]) for p in (teacher, student)]
        losses.append(9.0 * (0.5 * _kl(*binary) + 2.0 * _kl(*others)))
    return np.array(losses)


def _dist(s, t):
    """Huang 2022, by NumPy's own correlation."""
    s, t = _softmax(s / 3.0), _softmax(t / 3.0)
    inter = np.array([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s, t)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T)])
    return 9.0 * (0.5 * inter + 2.0 * intra)


def _standardized(s, t):
    s, t = ((z - z.mean(-1, keepdims=True)) / z.std(-1, keepdims=True) for z in (s, t))
    return _hinton(s, t)


def _attention(s, t):
    maps = []
    for features in (s, t):
        rows = np.sum(np.abs(features) ** 3, axis=-1).reshape(len(features), -1)
        maps.append(rows / np.linalg.norm(rows, axis=-1, keepdims=True))
    return np.mean((maps[0] - maps[1]) ** 2, axis=-1)


def _similarity(s, t):
    grams = []
    for features in (s, t):
        gram = np.einsum('ihwc,jhwc->ij', features, features)
        grams.append(gram / np.linalg.norm(gram, axis=-1, keepdims=True))
    return np.mean((grams[0] - grams[1]) ** 2, axis=-1)


CASES = {
    'hinton': (lambda s, t: distill.hinton(s, t, 3.0), _hinton, LOGITS),
    'dkd': (
        lambda s, t: distill.dkd(s, t, jnp.array(LABELS), alpha=0.5, beta=2.0, temperature=3.0),
        _dkd,
        LOGITS,
    ),
    'dist': (
        lambda s, t: distill.dist(s, t, beta=0.5, gamma=2.0, temperature=3.0),
        _dist,
        LOGITS,
    ),
    'standardized': (
        lambda s, t: distill.hinton(distill.standardized(s), distill.standardized(t), 3.0),
        _standardized,
        LOGITS,
    ),
    'logit_mse': (distill.logit_mse, lambda s, t: np.mean((s - t) ** 2, axis=-1), LOGITS),
    'hard_label': (
        distill.hard_label,
        lambda s, t: -np.log(_softmax(s)[np.arange(6), t.argmax(-1)]),
        LOGITS,
    ),
    'fitnet': (
        lambda s, t: distill.fitnet(s, t, jax.tree.map(jnp.float32, ADAPTER)),
        lambda s, t: np.mean((s @ ADAPTER['kernel'] + ADAPTER['bias'] - t) ** 2, axis=(1, 2, 3)),
        FEATURES,
    ),
    'attention_transfer': (
        lambda s, t: distill.attention_transfer(s, t, power=3.0),
        _attention,
        FEATURES,
    ),
    'similarity_preserving': (distill.similarity_preserving, _similarity, FEATURES),
}


@pytest.mark.parametrize('name', CASES)
def test_formulas(name):
    """In float32 against float64; the gradient in the student against differences in float64."""
    loss, reference, (student, teacher) = CASES[name]
    values = loss(jnp.float32(student), jnp.float32(teacher))
    assert values.shape == (6,) and values.dtype == jnp.float32
    np.testing.assert_allclose(values, reference(student, teacher), rtol=2e-5, atol=1e-6)

    along = np.random.default_rng(5).normal(size=student.shape)
    ahead, behind = (reference(student + h * along, teacher).mean() for h in (1e-6, -1e-6))
    gradient = jax.grad(lambda s: loss(s, jnp.float32(teacher)).mean())(jnp.float32(student))
    np.testing.assert_allclose(np.sum(gradient * along), (ahead - behind) / 2e-6, rtol=1e-3)


@pytest.mark.parametrize('name', CASES)
def test_half_precision_is_computed_in_float32(name):
    loss, _, (student, teacher) = CASES[name]
    half = jnp.float16(student), jnp.float16(teacher)
    values = loss(*half)
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(values, loss(*map(jnp.float32, half)))


@pytest.mark.parametrize('name', CASES)
def test_no_gradient_flows_to_the_teacher(name):
    loss, _, (student, teacher) = CASES[name]
    arrays = jnp.float32(student), jnp.float32(teacher)
    gradients = jax.grad(lambda s, t: loss(s, t).sum(), argnums=(0, 1))(*arrays)
    assert np.any(gradients[0]) and not np.any(gradients[1])


@pytest.mark.parametrize('name', CASES)
def test_gradients_are_numbers_where_nothing_differs_or_all_is_zero(name):
    """A student that begins as its teacher; channels that have all been closed."""
    loss, _, (student, teacher) = CASES[name]
    if name != 'fitnet':
        same = jnp.float32(teacher)
        value, gradient = jax.value_and_grad(lambda s: loss(s, same).sum())(same)
        assert name == 'hard_label' or abs(value) < 1e-4
        assert np.all(np.isfinite(gradient))
    zeros = jnp.zeros(student.shape)
    for other in (jnp.float32(teacher), jnp.zeros(teacher.shape)):
        value, gradient = jax.value_and_grad(lambda s, t=other: loss(s, t).sum())(zeros)
        assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_masked_classes_add_nothing():
    """Of a class that has no probability, 0 · log 0 is 0: in the value and in its gradient."""
    teacher, labels = jnp.array([[0.5, 2.0, -jnp.inf]]), jnp.array([0])
    losses = (
        lambda s, t: distill.hinton(s, t, 3.0).sum(),
        lambda s, t: distill.dkd(s, t, labels).sum(),
        lambda s, t: distill.distillation(s, t, labels).sum(),
    )
    for loss in losses:  # as if there were no such class
        value, slope = jax.value_and_grad(loss)(jnp.array([[1.0, 2.0, -jnp.inf]]), teacher)
        rest, slope_of_rest = jax.value_and_grad(loss)(jnp.array([[1.0, 2.0]]), teacher[:, :2])
        np.testing.assert_allclose(value, rest, rtol=1e-5)
        np.testing.assert_allclose(slope, [[*slope_of_rest[0], 0.0]], rtol=1e-5, atol=1e-7)

    student = jnp.array([[1.0, 2.0, 3.0]])  # which knows the class
    p, q = _softmax(np.array(teacher) / 3.0), _softmax(np.array(student) / 3.0)
    value, slope = jax.value_and_grad(losses[0])(student, teacher)
    np.testing.assert_allclose(value, 9.0 * _kl(p[0, :2], q[0, :2]), rtol=1e-5)
    np.testing.assert_allclose(slope, 3.0 * (q - p), rtol=1e-5)


def test_decoupled_by_hand():
    """Teacher (½, ¼, ¼), student (¼, ¼, ½), label 0.

    Label or not: ½, ½ against ¼, ¾, which is ½ ln 4/3 as above. The others: ½, ½ against ⅓, ⅔,
    which is ½ ln 3/2 + ½ ln 3/4 = ½ ln 9/8.
    """
    teacher, student = jnp.log(jnp.array([[2.0, 1.0, 1.0], [1.0, 1.0, 2.0]]))[:, None]
    settings = {'labels': jnp.array([0]), 'temperature': 1.0}
    for alpha, beta in ((1.0, 0.0), (0.0, 1.0), (2.0, 3.0)):
        loss = distill.dkd(student, teacher, alpha=alpha, beta=beta, **settings)
        expected = alpha * 0.5 * np.log(4 / 3) + beta * 0.5 * np.log(9 / 8)
        np.testing.assert_allclose(loss, [expected], rtol=1e-5)
    # Equation 6: with what the teacher gives the others as β, it is Hinton's.
    coupled = distill.dkd(student, teacher, alpha=1.0, beta=0.5, **settings)
    np.testing.assert_allclose(coupled, distill.hinton(student, teacher, 1.0), rtol=1e-5)


def test_decoupled_of_a_sure_teacher():
    """Log-probabilities of -1000 are no -inf, and no NaN."""
    teacher, student = jnp.array([[1000.0, 0.0, 0.0]]), jnp.array([[0.0, 1000.0, 0.0]])
    loss = lambda s: distill.dkd(s, teacher, jnp.array([0]), temperature=1.0).sum()  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(student)
    # 1000 for the label; ½, ½ against e^-1000 of the one and all of the other: ½ · 1000 - ln 2.
    np.testing.assert_allclose(value, 1000.0 + 8.0 * (500.0 - np.log(2)), rtol=1e-5)
    assert np.all(np.isfinite(gradient))


def test_relations_by_hand():
    """Two examples with one another's probabilities.

    Of each the correlation over the two classes is -1, so 1 - ρ = 2; over the examples, likewise.
    """
    teacher = jnp.log(jnp.array([[0.75, 0.25], [0.25, 0.75]]))
    loss = distill.dist(teacher[::-1], teacher, beta=1.0, gamma=10.0)
    np.testing.assert_allclose(loss, [22.0, 22.0], rtol=1e-5)
    # Scaled and shifted probabilities are in the same relation.
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    closer = jnp.log(jnp.array([[0.4, 0.32, 0.28]]))  # 0.4 · p + 0.2
    np.testing.assert_allclose(distill.dist(closer, logits, gamma=0.0), [0.0], atol=1e-6)


def test_relations_of_many_classes_and_of_one_example():
    """Of most classes no example has more than a trace; of one example there is no relation."""
    logits = 10 * jax.random.normal(jax.random.key(0), (8, 1000))
    np.testing.assert_allclose(distill.dist(logits, logits), np.zeros(8), atol=1e-5)
    np.testing.assert_allclose(distill.dist(logits[:1], logits[:1]), [1.0], atol=1e-5)


def test_standardized_by_hand():
    """(1, 3) has mean 2 and deviation 1; the size and the mean of logits are of no account."""
    np.testing.assert_allclose(
        distill.standardized(jnp.array([[1.0, 3.0]])), [[-1.0, 1.0]], rtol=1e-6
    )
    student = jnp.array([[1.0, 2.0, 4.0]])
    other = distill.standardized(5 * student + 7)
    np.testing.assert_allclose(other, distill.standardized(student), rtol=1e-5)


def test_logits_and_answers_by_hand():
    student = jnp.array([[0.0, np.log(3.0)]])  # ¼, ¾
    np.testing.assert_allclose(distill.logit_mse(student, jnp.array([[2.0, np.log(3.0)]])), [2.0])
    for teacher, expected in (([5.0, 1.0], np.log(4)), ([0.0, 0.1], np.log(4 / 3))):
        loss = distill.hard_label(student, jnp.array([teacher]))
        np.testing.assert_allclose(loss, [expected], rtol=1e-6)


def test_features_by_hand():
    """One position of two channels against one of one; then maps of two positions."""
    student, teacher = jnp.array([[[[1.0, 2.0]]]]), jnp.array([[[[10.0]]]])
    adapter = {'kernel': jnp.array([[3.0], [1.0]]), 'bias': jnp.array([1.0])}  # 3 + 2 + 1 = 6
    np.testing.assert_allclose(distill.fitnet(student, teacher, adapter), [16.0])
    np.testing.assert_allclose(distill.fitnet(teacher, teacher + 3.0), [9.0])
    # Squares over the channels: (9, 16), of length √(81 + 256) = √337; against (4, 0).
    student = jnp.array([[[[3.0, 0.0]], [[0.0, 4.0]]]])
    teacher = jnp.array([[[[2.0]], [[0.0]]]])
    a, b = 9 / np.sqrt(337), 16 / np.sqrt(337)
    loss = distill.attention_transfer(student, teacher)
    np.testing.assert_allclose(loss, [((a - 1) ** 2 + b**2) / 2], rtol=1e-5)


def test_similarities_by_hand():
    """Two equal examples, (√½, √½) in each row, against two without anything in common, (1, 0)."""
    student, teacher = jnp.array([[2.0], [2.0]]), jnp.array([[1.0, 0.0], [0.0, 3.0]])
    root = np.sqrt(0.5)
    expected = ((1 - root) ** 2 + root**2) / 2
    loss = distill.similarity_preserving(student, teacher)
    np.testing.assert_allclose(loss, [expected, expected], rtol=1e-5)


@pytest.mark.parametrize('name', CASES)
def test_wrong_types_and_shapes_are_refused(name):
    loss, _, (student, teacher) = CASES[name]
    student, teacher = jnp.float32(student), jnp.float32(teacher)
    with pytest.raises(AssertionError):
        loss(student.astype(int), teacher)
    with pytest.raises(AssertionError):
        loss(student, teacher[:3])


@pytest.mark.parametrize('name', ['fitnet', 'attention_transfer', 'similarity_preserving'])
def test_features_of_a_layer_that_has_gone(name):
    """Without channels they are those of zeros."""
    teacher = jnp.float32(FEATURES[1])
    adapter = {'kernel': jnp.ones((0, 7)), 'bias': jnp.ones(7)}
    arguments = (adapter,) if name == 'fitnet' else ()
    loss = getattr(distill, name)(teacher[..., :0], teacher, *arguments)
    arguments = ({'kernel': jnp.ones((1, 7)), 'bias': jnp.ones(7)},) if arguments else ()
    zeros = getattr(distill, name)(jnp.zeros((6, 2, 3, 1)), teacher, *arguments)
    np.testing.assert_allclose(loss, zeros, rtol=1e-6)
    assert np.all(loss > 0)
