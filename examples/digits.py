"""
Handwritten digits
==================

A classifier of 8 x 8 images: trained, evaluated, and what it gets wrong.
"""

# %%
# The images ship with the package as bytes from 0 to 16. They stay bytes: `input_scale` is what a row is multiplied by
# when a mini-batch takes it.

import fastmb as mb
import matplotlib.pyplot as plt
import numpy as np

X, y = mb.datasets.load_digits()
order = np.random.default_rng(0).permutation(len(X))
train, test = order[:1400], order[1400:]

net = mb.mlp([64, 128, 10], dropout=0.1, seed=0)
trainer = mb.Trainer(
    net,
    "cross_entropy",
    mb.AdamW(lr=0.003),
    batch_size=32,
    seed=0,
    input_scale=1 / 16,
)
print(net.summary(batch_size=32, optimizer="adamw"))

# %%
# Losses come after each epoch; the validation metric has an axis of its own.

history = trainer.fit(
    X[train], y[train], max_epochs=30, X_val=X[test], y_val=y[test], verbose=0
)
history.plot()
print(trainer.evaluate(X[test], y[test]))

# %%
# `predict` gives classes, `predict_proba` how sure the network is of them. These are images that it gets wrong.

found = net.predict(X[test])
sure = net.predict_proba(X[test]).max(axis=1)
wrong = np.flatnonzero(found != y[test])[:8]

fig, axes = plt.subplots(1, 8, figsize=(10, 2))
for ax in axes:
    ax.axis("off")
for ax, i in zip(axes, wrong, strict=False):
    ax.imshow(X[test][i].reshape(8, 8), cmap="gray_r")
    ax.set_title(f"{y[test][i]} as {found[i]}\n{sure[i]:.0%}")
fig.tight_layout()

# %%
# Parameters are NumPy arrays, so looking at them needs nothing else: here is what some hidden units look for.

weight = net.parameters()["0.weight"]  # (64, 128)
fig, axes = plt.subplots(2, 8, figsize=(10, 2.7))
for ax, unit in zip(axes.flat, weight.T, strict=False):
    ax.imshow(unit.reshape(8, 8), cmap="RdBu")
    ax.axis("off")
