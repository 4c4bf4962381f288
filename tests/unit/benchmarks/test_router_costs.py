"""What the comparison of routers writes, from measurements made up by hand."""

import pytest

from benchmarks.router import LOADS, Contender, Running, summary, table


def seen(per_s, p50, cpu_us=0.0, failed=0):
    figures = {"per_s": per_s, "p50": p50, "p95": 2 * p50, "p99": 4 * p50}
    return {**figures, "cpu_us": cpu_us, "failed": failed, "requests": 10, "all": 10}


class NoProcess:
    pid = 0


def runs():
    alone = Running(Contender("engine alone", "generate"), 1)
    ours = Running(Contender("dovetail", "generate", ("x",)), 2, NoProcess())
    for load in LOADS:
        alone.seen[load.name] = [seen(1000, 1.0), seen(900, 5.0), seen(800, 2.0)]
        ours.seen[load.name] = [seen(500, 1.5, 200), seen(300, 6.0, 400, 1), seen(400, 2.25, 300)]
    return [alone, ours]


def test_latency_is_what_a_router_has_beyond_the_engine_alone_in_the_same_round():
    rows = [row for row in summary(runs()) if row["contender"] == "dovetail"]
    assert len(rows) == len(LOADS)
    for row in rows:
        # 0.5, 1.0 and 0.25 ms beyond; medians of each column alone would differ by 0.25.
        assert row["p50_added"] == pytest.approx(0.5)
        assert row["p95_added"] == pytest.approx(1.0)
        assert row["per_s"] == 400 and row["per_s_range"] == [300, 500]
        assert row["cpu_us"] == 300
        assert row["failed"] == 1


def test_the_engine_alone_adds_nothing_and_the_table_names_every_way():
    rows = summary(runs())
    assert all(row["p99_added"] == 0 for row in rows if row["contender"] == "engine alone")
    text = table(rows)
    assert text.count("generate: dovetail") == len(LOADS)
    assert all(load.name in text for load in LOADS)
