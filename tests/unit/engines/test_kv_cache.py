"""What is written to a row or a segment is read back, however often the arena is rearranged."""

import random

import torch

from dovetail.engines.embedded.kv_cache import KVCache, LayerShape

SHAPES = [LayerShape(2, 4, 3), LayerShape(1, 2, 2)]


def make(tokens=100):
    return KVCache(SHAPES, tokens, torch.float32, torch.device("cpu"))


def fill_row(cache, row, length, mark):
    for layer in range(len(SHAPES)):
        for view in cache.rows(layer, row + 1, length):
            view[row] = mark


def row_holds(cache, row, length, mark):
    views = [v for layer in range(len(SHAPES)) for v in cache.rows(layer, row + 1, length)]
    return all(bool((v[row] == mark).all()) for v in views)


def segment_holds(cache, segment, mark):
    views = [v for layer in range(len(SHAPES)) for v in cache.segment(layer, segment)]
    return all(bool((v == mark).all()) for v in views)


def fill_segment(cache, segment, mark):
    for layer in range(len(SHAPES)):
        for view in cache.segment(layer, segment):
            view.fill_(mark)


def test_rows_keep_their_contents_when_they_grow_and_when_one_leaves():
    cache = make()
    assert cache.reserve_rows(3, 5)
    for row in range(3):
        fill_row(cache, row, 5, row + 1)
    assert cache.reserve_rows(3, 30)
    assert [row_holds(cache, row, 5, row + 1) for row in range(3)] == [True] * 3
    cache.drop_row(0, 5)
    assert row_holds(cache, 0, 5, 3) and row_holds(cache, 1, 5, 2)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    cache = make(tokens=50)
    segment = cache.new_segment(30, copied=False)
    assert segment is not None and cache.used_tokens == 30
    assert not cache.reserve_rows(1, 21)
    assert cache.reserve_rows(1, 20)
    assert cache.new_segment(1, copied=False) is None
    cache.free_segment(segment)
    assert cache.reserve_rows(1, 50)


def test_a_random_history_never_overlaps_and_never_leaks():
    chooser, cache = random.Random(1), make(tokens=200)
    rows, segments = [], []
    for mark in range(1, 2001):
        action = chooser.randrange(5)
        if action == 0 and cache.reserve_rows(len(rows) + 1, chooser.randint(1, 30)):
            rows.append((chooser.randint(1, cache.row_capacity), mark))
            fill_row(cache, len(rows) - 1, *rows[-1])
        elif action == 1 and rows:
            gone = chooser.randrange(len(rows))
            cache.drop_row(gone, rows[-1][0])
            rows[gone] = rows[-1]
            rows.pop()
        elif action == 2:
            segment = cache.new_segment(chooser.randint(1, 40), copied=False)
            if segment is not None:
                segments.append((segment, mark))
                fill_segment(cache, segment, mark)
        elif action == 3 and segments:
            cache.free_segment(segments.pop(chooser.randrange(len(segments)))[0])
        elif rows:
            cache.reserve_rows(len(rows), cache.row_capacity + chooser.randint(0, 5))
        assert all(row_holds(cache, i, length, m) for i, (length, m) in enumerate(rows))
        assert all(segment_holds(cache, s, m) for s, m in segments)
        used = len(rows) * cache.row_capacity + sum(s.length for s, _ in segments)
        assert cache.used_tokens == used <= 200
