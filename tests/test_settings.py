"""Arguments of a trainer that are assigned to after it was made."""

import pickle
import threading

import numpy as np
import pytest

import fastmb as mb
from fastmb._settings import settings

X, Y = mb.datasets.load_digits()


def trainer(executor=None, **options):
    net = mb.mlp([64, 12, 10], dropout=0.2, seed=1)
    usual = {"optimizer": mb.SGD(0.1), "batch_size": 100, "n_threads": 1, "executor": executor, "input_scale": 1 / 16}
    return mb.Trainer(net, **usual | options)


def fitted(each, epochs=1):
    each.fit(X[:500], Y[:500], max_epochs=epochs, verbose=0)
    return each


OTHERS = {
    "loss": mb.CrossEntropy(label_smoothing=0.3),
    "optimizer": mb.SGD(0.01, weight_decay=0.1),
    "batch_size": 64,
    "shuffle": False,
    "drop_last": True,
    "seed": 5,
    "n_threads": 2,
    "executor": "numpy",
    "input_scale": 1 / 8,
    "accumulate_steps": 2,
    "max_grad_norm": 1e-3,
    "clip_value": 1e-4,
    "clip_per_example": 0.01,
    "noise_multiplier": 0.5,
    "secure": True,
    "sampling": "poisson",
    "gradient_stats": True,
    "average": mb.EMA(0.9),
}


def test_all_settings_are_looked_at_here():
    assert set(OTHERS) == set(settings(mb.Trainer))


@pytest.mark.parametrize("name", OTHERS)
def test_a_setting_counts_from_when_it_is_assigned(name, executor):
    beside = {"clip_per_example": 1.0} if name == "noise_multiplier" else {}
    beside["executor"] = executor
    changed, made = trainer(**beside), trainer(**beside | {name: OTHERS[name]})
    setattr(changed, name, OTHERS[name])
    assert repr(getattr(changed, name)) == repr(getattr(made, name)) == repr(OTHERS[name])
    for each in (changed, made):
        fitted(each)
    assert changed.net.digest() == made.net.digest()
    assert pickle.loads(pickle.dumps(changed)).state.tobytes() == changed.state.tobytes() == made.state.tobytes()


def test_a_setting_that_is_assigned_between_fits_goes_on_from_the_same_state(executor):
    first = fitted(trainer(executor, optimizer=mb.SGD(0.1, momentum=0.9)))
    second = pickle.loads(pickle.dumps(first))
    state = first.state
    first.optimizer = mb.SGD(0.02, momentum=0.8, groups={"*.bias": {"lr": 2}})
    first.max_grad_norm = 0.5
    assert first.state is state
    vars(second).update(optimizer=first.optimizer, max_grad_norm=0.5)
    second = pickle.loads(pickle.dumps(second))  # all made anew
    assert fitted(first).net.digest() == fitted(second).net.digest()


def test_before_the_first_update_any_optimiser_is_taken(executor):
    changed, made = trainer(executor), trainer(executor, optimizer=mb.Adam(0.01))
    changed.optimizer = "adam"
    changed.optimizer = mb.Adam(0.01)
    assert fitted(changed).net.digest() == fitted(made).net.digest()
    assert changed.state.shape == (2, changed.net.plan.size)


def test_before_the_first_update_the_state_is_that_of_the_optimiser(executor):
    changed, made = (trainer(executor, optimizer=mb.Adagrad(0.01, initial_accumulator_value=v)) for v in (0, 2))
    lock = changed._lock
    changed.optimizer = made.optimizer
    assert changed._lock is lock
    assert (changed.state == made.state).all()
    assert fitted(changed).net.digest() == fitted(made).net.digest()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optimizer", mb.Adam(), "optimizer can't become Adam"),
        ("optimizer", mb.SGD(0.1, momentum=0.9), "another state than 5 updates have left; make a new Trainer"),
        ("average", mb.SWA(0), "average can't become SWA"),
        ("average", mb.EMA(0.9, every=1), "average can't become EMA"),
        ("batch_size", 0, "batch_size must be an integer >= 1"),
        ("loss", "mse2", "mse2"),
        ("clip_value", -1.0, "clip_value"),
        ("noise_multiplier", 1.0, "noise_multiplier needs clip_per_example"),
        ("sampling", "urn", "sampling"),
    ],
)
def test_what_a_setting_cannot_be_is_refused_and_changes_nothing(name, value, message):
    one, other = fitted(trainer(average=mb.EMA(0.9))), fitted(trainer(average=mb.EMA(0.9)))
    with pytest.raises(ValueError, match=message):
        setattr(one, name, value)
    assert repr(getattr(one, name)) == repr(getattr(other, name))
    assert fitted(one).net.digest() == fitted(other).net.digest()


def test_an_optimiser_that_means_another_state_by_a_matrix_is_refused(executor):
    one = fitted(trainer(executor, optimizer=mb.Muon(0.01, adamw_names=["0.*"])))
    before = one.optimizer
    for other in (mb.Muon(0.01), mb.Muon(0.01, adamw_names=["*"])):
        with pytest.raises(ValueError, match=r"optimizer can't become Muon.*another state than 5 updates have left"):
            one.optimizer = other
    assert one.optimizer is before
    one.optimizer = mb.Muon(0.02, adamw_names=["0.weight", "*.bias"])  # of biases AdamW has the state anyway
    all_adamw = fitted(trainer(executor, optimizer=mb.Muon(0.01, adamw_names=["*"])))
    all_adamw.optimizer = mb.AdamW(0.01)


def test_the_network_cannot_be_replaced():
    one, net = trainer(), mb.mlp([64, 12, 10])
    with pytest.raises(AttributeError, match="make a new Trainer of the other network"):
        one.net = net
    assert one.net is not net


def test_a_state_that_is_assigned_is_copied_in(executor):
    one, other = (fitted(trainer(executor, optimizer=mb.SGD(0.1, momentum=0.9))) for _ in range(2))
    state = one.state
    values = state * 2
    one.state = values
    other.state *= 2
    assert one.state is state
    assert fitted(one).net.digest() == fitted(other).net.digest()
    with pytest.raises(ValueError, match=r"^state must have shape \(1, \d+\); got \(0, \d+\)"):
        one.state = values[1:]


# ---- what a trainer and an optimiser don't have ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "betas"])
def test_what_the_optimiser_has_and_not_the_trainer_is_refused_with_a_hint(name):
    one = trainer()
    for each in (one, pickle.loads(pickle.dumps(one))):
        told = rf"^a Trainer has no '{name}'; its optimizer may have: trainer.optimizer"
        with pytest.raises(AttributeError, match=rf"{told} = SGD\({name}=0.1, [.]{{3}}\)"):
            setattr(each, name, 0.1)
        with pytest.raises(AttributeError, match=rf"{told}\.{name}$"):
            getattr(each, name)
        assert not hasattr(each, name)


@pytest.mark.parametrize("optimizer", [mb.SGD(), mb.Adam(), mb.AdamW(), mb.Muon(), mb.RMSprop(), mb.Lion(), mb.NAdam()])
def test_an_optimiser_that_is_assigned_to_tells_of_the_trainers(optimizer):
    name = type(optimizer).__name__
    for attribute in "lr", "learning_rate":
        with pytest.raises(AttributeError, match=rf"an optimizer can't be changed: .* trainer.optimizer = {name}\("):
            setattr(optimizer, attribute, 0.1)
    assert optimizer == type(optimizer)()


def test_mini_batches_stay_as_they_are_until_the_epoch_is_over():
    one = trainer()
    one.fit(X, Y, max_epochs=1, max_seconds=0, verbose=0)
    assert one._current is not None
    with pytest.raises(ValueError, match="batch_size can't become 32: an epoch is under way"):
        one.batch_size = 32
    one.batch_size = 100
    one.optimizer = mb.SGD(0.3)
    one.fit(X, Y, max_epochs=1, verbose=0)
    one.batch_size = 32


def test_an_assignment_waits_for_a_call_in_another_thread():
    one, inside = trainer(), threading.Event()

    class Slow(mb.Callback):
        def on_epoch_end(self, trainer, row):
            inside.set()
            threading.Event().wait(0.05)

    fit = threading.Thread(target=one.fit, args=(X, Y), kwargs={"max_epochs": 2, "verbose": 0, "callbacks": [Slow()]})
    fit.start()
    assert inside.wait(10)
    one.batch_size = 32  # refused inside an epoch, so it has waited for both
    fit.join()
    assert one.epoch == 2


def test_a_callback_may_change_the_learning_rate():
    class Half(mb.Callback):
        def on_epoch_end(self, trainer, row):
            trainer.optimizer = mb.SGD(trainer.optimizer.lr / 2)

    history = trainer().fit(X, Y, max_epochs=3, verbose=0, callbacks=[Half()])
    assert history["lr"] == [0.1, 0.05, 0.025]


def test_a_learning_rate_that_a_callback_changes_counts_from_the_next_mini_batch(executor):
    class Falling(mb.Callback):
        def on_batch_end(self, trainer, loss):
            trainer.optimizer = mb.SGD(0.1 / (trainer.t + 1))

    assigned, scheduled = trainer(executor), trainer(executor, optimizer=mb.SGD(lambda t: 0.1 / (t + 1)))
    assigned.fit(X[:500], Y[:500], max_epochs=2, verbose=0, callbacks=[Falling()])
    assert assigned.net.digest() == fitted(scheduled, 2).net.digest()
    assert assigned.history["lr"] == scheduled.history["lr"]
    assert assigned.history["loss"] == scheduled.history["loss"]


@pytest.mark.parametrize("method", ["on_fit_begin", "on_batch_end", "on_epoch_end"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_callback_cannot_change_other_settings(name, method):
    value = mb.SGD(0.1, groups={"*.bias": {"lr": 2}}) if name == "optimizer" else OTHERS[name]

    def assign(self, one, *news):
        setattr(one, name, value)

    options = {"clip_per_example": 1.0} if name == "noise_multiplier" else {}
    one, other = trainer(**options), trainer(**options)
    with pytest.raises(RuntimeError, match=f"{name} can't become .*: fit.. of this trainer is under way"):
        one.fit(X, Y, verbose=0, callbacks=[type("Assigning", (mb.Callback,), {method: assign})()])
    assert repr(getattr(one, name)) == repr(getattr(other, name))
    setattr(one, name, getattr(other, name))


# ---- what calls leave behind ---------------------------------------------------------------------------------------


def taught(net):
    return net.task, net.input_scale, net.squeeze


def test_another_trainer_of_a_network_tells_it_nothing_until_it_trains(executor):
    Z, z = np.ones((50, 4)), np.arange(50) % 2
    net = mb.mlp([4, 1])
    first = mb.Trainer(net, "bce_with_logits", n_threads=1, executor=executor, input_scale=0.5)
    assert taught(net) == ("multilabel", 0.5, False)  # by its first trainer, at once
    first.fit(Z, z, max_epochs=1, verbose=0)
    before, predicted = taught(net), net.predict_proba(Z)
    assert before == ("multilabel", 0.5, True)
    second = mb.Trainer(net, "mse", n_threads=1, executor=executor)
    second.evaluate(Z, Z[:, :1])
    for name, value in (("optimizer", mb.SGD(momentum=0.9)), ("input_scale", -1), ("loss", "mse2")):
        with pytest.raises(ValueError, match=name):
            setattr(first, name, value)
    with pytest.raises(ValueError, match="batch_size"):
        mb.Trainer(net, "mse", batch_size=0)
    first.input_scale, second.input_scale = 0.25, 2.0
    assert taught(net) == before
    assert (net.predict_proba(Z) == predicted).all()
    second.step(Z, Z[:, :1])
    assert taught(net) == ("regression", 2.0, False)
    first.accumulate(Z, z)
    assert taught(net) == ("multilabel", 0.25, True)
    second.fit(Z, z, max_epochs=1, verbose=0)
    assert taught(net) == ("regression", 2.0, True)
    first.zero_grad()
    first.backward(Z, Z[:, :1])
    assert taught(net)[:2] == ("multilabel", 0.25)


def test_a_checkpoint_tells_the_network_of_the_trainer_that_loads_it(tmp_path):
    Z, z = np.ones((50, 4)), np.arange(50) % 2
    net = mb.mlp([4, 1])
    mb.Trainer(net, "mse", input_scale=0.1).step(Z, z)
    second = mb.Trainer(net, "bce_with_logits", input_scale=0.5)
    other = mb.Trainer(mb.mlp([4, 1]), "bce_with_logits", input_scale=0.5)
    other.step(Z, Z[:, :1])
    other.save(tmp_path / "file")
    second.load(tmp_path / "file")
    assert taught(net) == taught(other.net) == taught(mb.load(tmp_path / "file").net)
    assert (net.predict_proba(Z) == other.net.predict_proba(Z)).all()


def test_only_training_tells_whether_predictions_have_a_dimension_of_outputs():
    Z = np.ones((50, 4))
    one = mb.Trainer(mb.mlp([4, 8, 1]), "mse", n_threads=1)
    one.fit(Z, Z[:, 0], max_epochs=1, verbose=0)
    one.evaluate(Z, Z[:, :1])
    with pytest.raises(ValueError, match="features"):
        one.fit(Z[:, :3], Z[:, 0], X_val=Z, y_val=Z[:, :1])
    with pytest.raises(FloatingPointError):
        one.step(np.full((2, 4), np.nan), np.ones((2, 1)))
    assert one.net.predict(Z).shape == (50,)
    one.accumulate(Z, Z[:, :1])
    assert one.net.predict(Z).shape == (50, 1)
    one.step(Z, Z[:, 0])
    assert one.net.predict(Z).shape == (50,)


@pytest.mark.parametrize("average", [None, mb.EMA(0.9)])
def test_a_state_from_before_the_first_update_stays(average):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 5)), rng.integers(0, 3, 40)
    trainer = mb.Trainer(mb.mlp([5, 8, 3]), optimizer=mb.SGD(1e30, momentum=0.9), batch_size=5, average=average)
    trainer.state = given = np.full_like(trainer.state, 0.5)
    with pytest.raises(FloatingPointError, match="weights and optimiser state have the values they began with"):
        trainer.fit(x, y, max_epochs=1, verbose=0)
    assert np.array_equal(trainer.state, given)
    trainer.optimizer = mb.SGD(0.1, momentum=0.8)
    assert np.array_equal(trainer.state, given)


def test_a_state_that_nobody_has_touched_is_the_new_optimisers():
    trainer = mb.Trainer(mb.mlp([64, 8, 10]), optimizer=mb.Adagrad(initial_accumulator_value=0.25))
    trainer.optimizer = mb.Adagrad(initial_accumulator_value=0.5)
    assert (trainer.state == 0.5).all()
