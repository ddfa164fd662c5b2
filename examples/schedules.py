"""
Learning-rate schedules
=======================

What the schedules look like, and what they do for a fit.
"""

# %%
# A schedule is a function of the number of updates: `rates` evaluates many at once.

import fastmb as mb
import matplotlib.pyplot as plt

steps = 1000
schedules = {
    "LinearLR": mb.LinearLR(1.0, start_factor=0.1, total_iters=500),
    "StepLR": mb.StepLR(1.0, step_size=250, gamma=0.5),
    "ExponentialLR": mb.ExponentialLR(1.0, gamma=0.997),
    "PolynomialLR": mb.PolynomialLR(1.0, total_iters=steps, power=2),
    "CosineAnnealingLR": mb.CosineAnnealingLR(1.0, T_max=steps),
    "CosineAnnealingWarmRestarts": mb.CosineAnnealingWarmRestarts(
        1.0, T_0=150, T_mult=2
    ),
    "CyclicLR": mb.CyclicLR(0.1, 1.0, step_size_up=100, mode="triangular2"),
    "OneCycleLR": mb.OneCycleLR(1.0, total_steps=steps),
    "WarmUp, then a cosine": mb.WarmUp(
        mb.CosineAnnealingLR(1.0, T_max=steps), total_iters=100
    ),
}

fig, axes = plt.subplots(3, 3, figsize=(10, 7), sharex=True, sharey=True)
for ax, (name, schedule) in zip(axes.flat, schedules.items(), strict=True):
    ax.plot(schedule.rates(0, steps))
    ax.set_title(name, fontsize=10)
for ax in axes[-1]:
    ax.set_xlabel("update")
fig.tight_layout()

# %%
# An optimiser takes one in place of a number. The same network, data and seed, with a constant rate and with one cycle:

X, y = mb.datasets.load_digits()
epochs, batch = 20, 64
updates = epochs * -(-1500 // batch)

fig, ax = plt.subplots()
for name, lr in {
    "0.1": 0.1,
    "one cycle up to 0.3": mb.OneCycleLR(0.3, total_steps=updates),
}.items():
    net = mb.mlp([64, 64, 10], seed=0)
    trainer = mb.Trainer(
        net,
        "cross_entropy",
        mb.SGD(lr, momentum=0.9),
        batch_size=batch,
        input_scale=1 / 16,
    )
    history = trainer.fit(
        X[:1500],
        y[:1500],
        max_epochs=epochs,
        X_val=X[1500:],
        y_val=y[1500:],
        verbose=0,
    )
    ax.plot(history["epoch"], history["loss"], label=f"lr: {name}")
    print(f"{name}: {history['val_accuracy'][-1]:.3f}")
ax.set_yscale("log")
ax.set_xlabel("epoch")
ax.set_ylabel("training loss")
ax.legend()

# %%
# A schedule that ends before the fit does is refused before the first update:

try:
    trainer.fit(X[:1500], y[:1500], max_epochs=1, verbose=0)
except ValueError as error:
    print(error)
