"""
Finding a learning rate
=======================

One rate is too small to learn by, another too large to stay upright. A few hundred mini-batches tell which.
"""

# %%
# `find_lr` trains a copy of the trainer, each mini-batch with a larger rate than the one before. Where the loss falls
# most steeply is a good one to begin with.

import fastmb as mb
import matplotlib.pyplot as plt

X, y = mb.datasets.load_digits()


def make(optimizer):
    return mb.Trainer(
        mb.mlp([64, 64, 10], seed=0),
        "cross_entropy",
        optimizer,
        seed=0,
        input_scale=1 / 16,
    )


optimizers = {
    "SGD": mb.SGD,
    "SGD, momentum 0.9": lambda **lr: mb.SGD(momentum=0.9, **lr),
    "Adam": mb.Adam,
}
suggestions = {}
fig, axes = plt.subplots(1, 3, figsize=(12, 3.5))
for ax, (name, optimizer) in zip(axes, optimizers.items(), strict=True):
    found = mb.find_lr(make(optimizer()), X, y)
    suggestions[name] = found.suggestion
    found.plot(ax)
    ax.set_title(name)
fig.tight_layout()

# %%
# What a tenth, the whole and ten times of what was suggested come to in ten epochs:

fig, axes = plt.subplots(1, 3, figsize=(12, 3.5), sharey=True)
for ax, (name, optimizer) in zip(axes, optimizers.items(), strict=True):
    for factor in (0.1, 1, 10):
        lr = factor * suggestions[name]
        history = make(optimizer(lr=lr)).fit(X, y, max_epochs=10, verbose=0)
        ax.plot(history["epoch"], history["loss"], label=f"lr {lr:.2g}")
    ax.set_ylim(0, 3)
    ax.set_title(name)
    ax.set_xlabel("epoch")
    ax.legend()
axes[0].set_ylabel("loss")
fig.tight_layout()
