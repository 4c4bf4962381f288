import collections

from dovetail.data.order import epoch_order


def test_file_order_without_shuffle():
    assert epoch_order(4, seed=3, epoch=9, shuffle=False) == [0, 1, 2, 3]


def test_a_shuffled_order_is_a_permutation_fixed_by_seed_and_epoch():
    # Written down once: a changed order would silently break the resuming of older runs.
    assert epoch_order(8, seed=42, epoch=0, shuffle=True) == [6, 3, 4, 7, 1, 0, 5, 2]
    orders = {tuple(epoch_order(50, s, e, True)) for s in range(4) for e in range(4)}
    assert len(orders) == 16
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_every_place_is_about_equally_likely():
    firsts = collections.Counter(epoch_order(5, 7, epoch, True)[0] for epoch in range(5000))
    # Binomial(5000, 0.2): standard deviation 28.
    assert all(abs(firsts[i] - 1000) < 150 for i in range(5))
