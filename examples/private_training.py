"""
Training with differential privacy
==================================

Every row's gradient is clipped, noise is added to their sum, and mini-batches are drawn by chance: then it can be said,
as a number, how little the weights tell of any one row (Abadi et al. 2016). The number comes from the package
`dp-accounting`: ``pip install dp-accounting``.
"""

import math

import dp_accounting
import fastmb as mb
from dp_accounting import rdp

X, y = mb.datasets.load_digits()
X_test, y_test = X[::5], y[::5]
kept = [i for i in range(len(X)) if i % 5]
X, y = X[kept], y[kept]

# %%
# ``secure=True`` would take noise and mini-batches from the operating system, as training on real secrets should.

batch_size, noise_multiplier, epochs, delta = 128, 2.0, 40, 1e-4
trainer = mb.Trainer(
    mb.mlp([64, 64, 10], activation="tanh"),
    optimizer=mb.SGD(lr=0.5, momentum=0.9),
    batch_size=batch_size,
    input_scale=1 / 16,
    clip_per_example=1.0,
    noise_multiplier=noise_multiplier,
    sampling="poisson",
)
trainer.fit(X, y, max_epochs=epochs, verbose=0)

# %%
# Each update is a Gaussian mechanism on a Poisson sample; the accountant adds them up.

accountant = rdp.RdpAccountant()
event = dp_accounting.PoissonSampledDpEvent(
    batch_size / len(X), dp_accounting.GaussianDpEvent(noise_multiplier)
)
accountant.compose(event, trainer.t)
epsilon = accountant.get_epsilon(delta)
accuracy = trainer.evaluate(X_test, y_test)["accuracy"]
print(
    f"{trainer.t} updates: epsilon {epsilon:.2f} at delta {delta:g}; accuracy on other rows {accuracy:.3f}"
)
assert trainer.t == epochs * math.ceil(len(X) / batch_size)
