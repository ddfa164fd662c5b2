"""Random numbers are the published functions of their counters."""

import numpy as np
import pytest

from fastmb import rng

GOLDEN = 0x9E3779B97F4A7C15


def test_splitmix64_gives_the_published_sequence():
    # The first outputs of Vigna's splitmix64.c from state 0; its state grows by GOLDEN.
    outputs = [rng.splitmix64(i * GOLDEN % 2**64) for i in range(3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of Random123, philox4x32 with 10 rounds
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox4x32_gives_the_known_answers(counter, key, expected):
    assert tuple(int(word) for word in rng.philox4x32(counter, key)) == expected


def shuffled(n, seed, epoch):
    """The definition, in Python's integers."""
    key = rng.splitmix64(rng.splitmix64(seed) ^ epoch)
    order = list(range(n))
    for i in range(n - 1, 0, -1):
        j = rng.splitmix64((key + i * GOLDEN) % 2**64) * (i + 1) >> 64
        order[i], order[j] = order[j], order[i]
    return order


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 64, 1000])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (1, 5), (2**64 - 1, 3)])
def test_permutation_is_the_fisher_yates_shuffle_of_its_definition(n, seed, epoch):
    order = rng.permutation(n, seed, epoch)
    assert order.dtype == np.int64
    assert order.tolist() == shuffled(n, seed, epoch)
    key = rng.splitmix64(rng.splitmix64(seed) ^ epoch)
    assert rng._permutation(n, key).tolist() == order.tolist()  # compiled or not


def test_multiply_high_carries_from_the_low_half():
    u = [0, 1, 2**33 - 1, 2**63 + 12345, 2**64 - 1]
    m = [2**32, 2**32, 2**31 + 1, 2**32 - 1, 2**32]
    found = rng._multiply_high(np.array(u, dtype=np.uint64), np.array(m, dtype=np.uint64))
    assert found.tolist() == [a * b >> 64 for a, b in zip(u, m, strict=True)]


def test_permutation_differs_between_epochs_and_between_seeds():
    orders = [rng.permutation(100, seed, epoch).tolist() for seed in range(3) for epoch in range(3)]
    assert len(set(map(tuple, orders))) == 9
    assert all(sorted(order) == list(range(100)) for order in orders)


def test_permutation_puts_every_row_everywhere_equally_often():
    n, epochs = 5, 4000
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        counts[np.arange(n), rng.permutation(n, 1, epoch)] += 1
    deviation = np.sqrt(epochs / n * (1 - 1 / n))
    assert np.abs(counts - epochs / n).max() < 4.5 * deviation


def test_dropout_mask_is_the_philox_word_of_its_row_and_unit():
    seed, t, index, p = 0x123456789ABCDEF0, 2**32 + 7, 2, 0.3
    mask = rng.dropout_mask(seed, t, index, 3, 10, p, np.dtype("float32"))
    for row in range(3):
        for unit in range(10):
            words = rng.philox4x32((unit // 4, row, 7, 1 ^ (2 << 24)), (0x9ABCDEF0, 0x12345678))
            kept = int(words[unit % 4]) >= int(0.3 * 2**32)
            assert mask[row, unit] == (float(np.float32(1 / 0.7)) if kept else 0)


def test_dropout_keeps_the_mean():
    mask = rng.dropout_mask(0, 0, 0, 1000, 100, 0.25, np.dtype("float64"))
    kept = (mask > 0).mean()
    assert abs(kept - 0.75) < 5 * np.sqrt(0.75 * 0.25 / mask.size)
    assert set(np.unique(mask)) == {0.0, 1 / 0.75}


def test_dropout_masks_differ_between_steps_and_between_dropouts():
    masks = {
        rng.dropout_mask(0, t, index, 4, 16, 0.5, np.dtype("float64")).tobytes() for t in (0, 1) for index in (0, 1)
    }
    assert len(masks) == 4


def test_stream_is_uniform_and_normal():
    n = 100_000
    stream = rng.Stream(0)
    u, z = stream.uniform(n), stream.normal(n)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / np.sqrt(12 * n)
    assert abs(z.mean()) < 5 / np.sqrt(n)
    assert abs(z.var() - 1) < 5 * np.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 5 * np.sqrt(96 / n)
