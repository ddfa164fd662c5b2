"""
Early stopping
==============

Few data, a large network: it learns them by heart, unless somebody stops it.
"""

# %%
# 300 digits to train on, the rest to validate. `restore_best` puts back the weights of the best epoch when the fit has
# ended.

import fastmb as mb
import matplotlib.pyplot as plt

X, y = mb.datasets.load_digits()
data = {
    "X": X[:300],
    "y": y[:300],
    "X_val": X[300:],
    "y_val": y[300:],
    "verbose": 0,
}


def make():
    net = mb.mlp([64, 256, 10], seed=0)
    return mb.Trainer(
        net,
        "cross_entropy",
        mb.Adam(lr=0.003),
        batch_size=32,
        seed=0,
        input_scale=1 / 16,
    )


stopped = make()
stopping = mb.EarlyStopping(
    "val_loss", patience=10, min_delta=0.001, restore_best=True
)
history = stopped.fit(**data, max_epochs=200, callbacks=[stopping])
print(f"ended after epoch {stopped.epoch}: {history.stopped}")
print(f"the best was epoch {stopping.best_epoch}")

# %%
# What would have come:

on = make()
whole = on.fit(**data, max_epochs=100)

fig, ax = plt.subplots()
ax.plot(whole["epoch"], whole["loss"], label="loss")
ax.plot(whole["epoch"], whole["val_loss"], label="val_loss")
ax.axvline(stopping.best_epoch, color="C2", label="the best epoch")
ax.axvline(stopped.epoch, color="C3", linestyle="--", label="stopped here")
ax.set_yscale("log")
ax.set_xlabel("epoch")
ax.legend()

for name, trainer in {"stopped": stopped, "100 epochs": on}.items():
    print(name, trainer.evaluate(X[300:], y[300:]))

# %%
# A metric that isn't there is refused at once, with those that are:

try:
    make().fit(**data, callbacks=[mb.EarlyStopping("val_acuracy")])
except ValueError as error:
    print(error)
