"""
What a mini-batch does
======================

A step of mini-batch gradient descent is often explained as a loop: take an example, go forward, compute its gradient;
take the next; add up; divide by their number; update the weights. Here the loop is run as it is told, and gives the
same weights as the one pass of matrix products that a library makes of it.
"""

import time

import fastmb as mb
import numpy as np

X, y = mb.datasets.load_digits()
X, y = X[:64], y[:64]


def trainer():
    return mb.Trainer(
        mb.mlp([64, 32, 10], dtype="float64"),
        optimizer=mb.SGD(lr=0.1),
        input_scale=1 / 16,
    )


def timed(what, best=20):
    """Seconds, the least of some runs, and the weights after one."""
    times = []
    for _ in range(best):
        one = trainer()
        begin = time.perf_counter()
        what(one)
        times.append(time.perf_counter() - begin)
    return min(times), one.net.flat


# %%
# The loop, word for word: one example at a time, then one update.


def the_loop(one):
    for i in range(len(X)):
        one.accumulate(X[i : i + 1], y[i : i + 1])
    one.apply()


# %%
# What libraries do: all examples in one pass.


def the_batch(one):
    one.step(X, y)


# %%
# And by hand: every example's own gradient, which the one pass still knows, averaged.


def by_hand(one):
    gradients = one.per_example_gradients(X, y)
    for name, weights in one.net.parameters().items():
        weights -= 0.1 * gradients[name].mean(axis=0)


batched, expected = timed(the_batch)
largest = np.abs(expected).max()
print(f"the batched step:      {1e6 * batched:8.1f} us")
for name, what in (("the loop", the_loop), ("averaged by hand", by_hand)):
    seconds, weights = timed(what)
    ulps = np.abs(weights - expected).max() / np.spacing(largest)
    print(
        f"{name + ':':<22} {1e6 * seconds:8.1f} us; largest difference {ulps:.2f} ulp of the largest weight"
    )
    assert ulps < 4

# %%
# The two ends of the same call: all rows at a time is (full-batch) gradient descent, one row at a time the stochastic
# gradient descent of the books. Whatever lies between is a mini-batch.

for rows, name in (
    (len(X), "full batch"),
    (16, "mini-batches"),
    (1, "one example"),
):
    one = mb.Trainer(
        mb.mlp([64, 32, 10]),
        optimizer=mb.SGD(lr=0.1),
        batch_size=rows,
        input_scale=1 / 16,
    )
    history = one.fit(X, y, max_epochs=20, verbose=0)
    print(
        f"{name + ',':<14} {one.t:5d} updates in 20 epochs: loss {history['loss'][0]:.3f} -> {history['loss'][-1]:.3f}"
    )

# %%
# What gets lost in the mean, and doesn't here: which examples pull hardest.

norms = one.per_example_norms(X, y)
hardest = np.argsort(-norms)[:5]
print(
    "longest gradients:",
    ", ".join(f"row {row} ({norms[row]:.2f})" for row in hardest),
)
