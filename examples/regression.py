"""
Regression on a table
=====================

Ten columns, of which five matter: Friedman's function, with noise.
"""

# %%
# The target is ``10 sin(pi x0 x1) + 20 (x2 - 1/2)^2 + 10 x3 + 5 x4``, and noise of unit size [Friedman1991]_. Scaled to
# unit size itself, it lets the usual learning rates work.

import fastmb as mb
import matplotlib.pyplot as plt
import numpy as np

rng = np.random.default_rng(0)
X = rng.uniform(size=(4000, 10))
signal = (
    10 * np.sin(np.pi * X[:, 0] * X[:, 1])
    + 20 * (X[:, 2] - 0.5) ** 2
    + 10 * X[:, 3]
    + 5 * X[:, 4]
)
y = signal + rng.normal(size=4000)
mean, scale = y[:3000].mean(), y[:3000].std()
target = (y - mean) / scale

# %%
# `"huber"` would be less impressed by outliers; here there are none.

net = mb.mlp([10, 64, 64, 1], activation="silu", seed=0)
trainer = mb.Trainer(
    net, "mse", mb.AdamW(lr=0.003, weight_decay=0.01), batch_size=64, seed=0
)
stopping = mb.EarlyStopping("val_loss", patience=10, restore_best=True)
history = trainer.fit(
    X[:3000],
    target[:3000],
    X_val=X[3000:],
    y_val=target[3000:],
    max_epochs=100,
    callbacks=[stopping],
    verbose=0,
)
print(f"epoch {stopping.best_epoch}: {trainer.evaluate(X[3000:], target[3000:])}")
print(f"the noise allows an r2 of {1 - 1 / y[3000:].var():.3f}")

# %%
# On the left predictions against targets, on the right what the network has learnt of the first two columns, the
# others held at their middle.

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
predicted = net.predict(X[3000:]) * scale + mean
left.scatter(y[3000:], predicted, s=4, alpha=0.5)
left.plot([0, 30], [0, 30], "k--", linewidth=1)
left.set_xlabel("target")
left.set_ylabel("predicted")

grid = np.full((50 * 50, 10), 0.5)
grid[:, 0], grid[:, 1] = map(np.ravel, np.meshgrid(*[np.linspace(0, 1, 50)] * 2))
surface = net.predict(grid).reshape(50, 50) * scale + mean
image = right.contourf(surface, levels=12, extent=(0, 1, 0, 1))
right.set_xlabel("$x_0$")
right.set_ylabel("$x_1$")
fig.colorbar(image)

# %%
# .. [Friedman1991] J. H. Friedman, "Multivariate adaptive regression splines", The Annals of Statistics 19, 1991.
