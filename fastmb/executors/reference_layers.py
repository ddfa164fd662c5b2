"""What the stages of a plan compute, forward and back, for the reference executor: float64, plain, obviously right.

A kind of stage is a class with three methods. `forward` takes rows x, ``[n, n_in]``, and gives f(x), ``[n, n_out]``,
and what the way back needs; `backward` takes that and the gradient dz with respect to f(x), and gives the one with
respect to x and those with respect to the parameters, by name; `each_row` gives each row's part in these, ``[n, ...]``.
`p` are a stage's parameters and buffers by name.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..plan import Stage

Arrays = dict[str, np.ndarray]


class Linear:
    """x W + b."""

    @staticmethod
    def forward(stage: Stage, x: np.ndarray, p: Arrays, training: bool) -> tuple[np.ndarray, Any]:  # noqa: ARG004
        return x @ p["weight"] + p.get("bias", 0.0), x

    @staticmethod
    def backward(stage: Stage, dz: np.ndarray, p: Arrays, x: Any) -> tuple[np.ndarray, Arrays]:  # noqa: ARG004
        return dz @ p["weight"].T, {"weight": x.T @ dz, "bias": dz.sum(axis=0)}

    @staticmethod
    def each_row(stage: Stage, dz: np.ndarray, x: Any) -> Arrays:  # noqa: ARG004
        return {"weight": x[:, :, None] * dz[:, None, :], "bias": dz}


class BatchNorm:
    """Each feature normalised over the rows: those of the mini-batch, or, unless training, all that were seen."""

    @staticmethod
    def forward(stage: Stage, x: np.ndarray, p: Arrays, training: bool) -> tuple[np.ndarray, Any]:
        mean, variance = (x.mean(axis=0), x.var(axis=0)) if training else (p["running_mean"], p["running_var"])
        scale = 1 / np.sqrt(variance + stage.eps)
        normal = (x - mean) * scale
        return normal * p.get("weight", 1.0) + p.get("bias", 0.0), (normal, scale, mean, variance, training)

    @staticmethod
    def backward(stage: Stage, dz: np.ndarray, p: Arrays, saved: Any) -> tuple[np.ndarray, Arrays]:  # noqa: ARG004
        normal, scale, _, _, training = saved
        return _normal_backward(dz, p, normal, scale, 0 if training else None)

    @staticmethod
    def each_row(stage: Stage, dz: np.ndarray, saved: Any) -> Arrays:  # noqa: ARG004
        return {"weight": dz * saved[0], "bias": dz}

    @staticmethod
    def update_buffers(stage: Stage, p: Arrays, saved: Any, rows: int) -> None:
        """Move the running statistics, `p` being views of them, towards those of a mini-batch."""
        _, _, mean, variance, _ = saved
        p["num_batches_tracked"] += 1
        share = 1 / float(p["num_batches_tracked"][0]) if stage.momentum is None else stage.momentum
        for name, new in ("running_mean", mean), ("running_var", variance * rows / (rows - 1)):
            p[name][:] = (1 - share) * p[name].astype(np.float64) + share * new


class LayerNorm:
    """Each row normalised over its features."""

    @staticmethod
    def forward(stage: Stage, x: np.ndarray, p: Arrays, training: bool) -> tuple[np.ndarray, Any]:  # noqa: ARG004
        scale = 1 / np.sqrt(x.var(axis=1, keepdims=True) + stage.eps)
        normal = (x - x.mean(axis=1, keepdims=True)) * scale
        return normal * p.get("weight", 1.0) + p.get("bias", 0.0), (normal, scale)

    @staticmethod
    def backward(stage: Stage, dz: np.ndarray, p: Arrays, saved: Any) -> tuple[np.ndarray, Arrays]:  # noqa: ARG004
        normal, scale = saved
        return _normal_backward(dz, p, normal, scale, 1)

    @staticmethod
    def each_row(stage: Stage, dz: np.ndarray, saved: Any) -> Arrays:  # noqa: ARG004
        return {"weight": dz * saved[0], "bias": dz}


def _normal_backward(
    dz: np.ndarray, p: Arrays, normal: np.ndarray, scale: np.ndarray, axis: int | None
) -> tuple[np.ndarray, Arrays]:
    """A normalisation's gradients: what mean and variance, along `axis`, take away has no part in dx."""
    gradients = {"weight": (dz * normal).sum(axis=0), "bias": dz.sum(axis=0)}
    dz = dz * p.get("weight", 1.0)
    if axis is None:  # they are constants
        return scale * dz, gradients
    along, across = (part.mean(axis=axis, keepdims=True) for part in (dz * normal, dz))
    return scale * (dz - across - normal * along), gradients


class PReLU:
    """x where x > 0, else weight x."""

    @staticmethod
    def forward(stage: Stage, x: np.ndarray, p: Arrays, training: bool) -> tuple[np.ndarray, Any]:  # noqa: ARG004
        return np.where(x > 0, x, p["weight"] * x), x

    @staticmethod
    def backward(stage: Stage, dz: np.ndarray, p: Arrays, x: Any) -> tuple[np.ndarray, Arrays]:
        of_features = np.where(x > 0, 0, x * dz).sum(axis=0)
        gradient = of_features if stage.columns == stage.n_out else of_features.sum(keepdims=True)
        return dz * np.where(x > 0, 1, p["weight"]), {"weight": gradient}

    @staticmethod
    def each_row(stage: Stage, dz: np.ndarray, x: Any) -> Arrays:
        of_features = np.where(x > 0, 0, x * dz)
        return {"weight": of_features if stage.columns == stage.n_out else of_features.sum(axis=1, keepdims=True)}


class Identity:
    """x."""

    @staticmethod
    def forward(stage: Stage, x: np.ndarray, p: Arrays, training: bool) -> tuple[np.ndarray, Any]:  # noqa: ARG004
        return x, None

    @staticmethod
    def backward(stage: Stage, dz: np.ndarray, p: Arrays, saved: Any) -> tuple[np.ndarray, Arrays]:  # noqa: ARG004
        return dz, {}

    @staticmethod
    def each_row(stage: Stage, dz: np.ndarray, saved: Any) -> Arrays:  # noqa: ARG004
        return {}


KINDS: dict[str, Any] = {
    "linear": Linear,
    "batch_norm": BatchNorm,
    "layer_norm": LayerNorm,
    "prelu": PReLU,
    "identity": Identity,
}
