"""Run directories: made once, never mixed up, and nothing of an earlier run is lost on resuming."""

import pytest

from dovetail.observe.atomic import write_atomic
from dovetail.observe.run_dir import RunDir
from dovetail.types.errors import ConfigError


def test_the_default_is_the_first_free_name_below_outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [str(RunDir.create("math").path) for _ in range(3)]
    assert names == ["outputs/math", "outputs/math-2", "outputs/math-3"]


def test_a_directory_that_holds_a_run_is_continued_replaced_or_refused(tmp_path):
    first = RunDir.create("r", tmp_path / "run")
    first.metrics.write_text("{}\n")
    first.checkpoints.mkdir()
    (first.path / "notes.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds a run already.*--run-dir.*--load"):
        RunDir.create("r", tmp_path / "run")
    assert RunDir.create("r", tmp_path / "run", resuming=True).metrics.is_file()
    RunDir.create("r", tmp_path / "run", replace=True)
    assert [p.name for p in first.path.iterdir()] == ["notes.md"]


def test_a_directory_that_cannot_be_made_is_an_error_with_the_flag(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="--run-dir"):
            RunDir.create("r", place)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").write_text("x")
    with pytest.raises(ConfigError, match="--run-dir"):
        RunDir.create("r")


def test_the_run_around_a_checkpoint_is_found(tmp_path):
    run = RunDir.create("r", tmp_path / "run")
    assert RunDir.around(run.checkpoints / "step_000001") is None
    run.config.write_text("")
    assert RunDir.around(run.checkpoints / "step_000001") == run


def test_sample_files_of_an_abandoned_future_are_moved_not_lost(tmp_path):
    run = RunDir.create("r", tmp_path)
    paths = [run.samples(1), run.samples(2), run.eval_samples("a/b", 2), run.samples(3)]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text(path.name)
    assert paths[2].name == "a_b_000002.jsonl"
    moved = run.supersede_samples(2)
    assert [str(p.relative_to(tmp_path)) for p in moved] == [
        "samples/superseded-1",
        "eval/superseded-1",
    ]
    assert {p.name: p.read_text() for p in moved[0].iterdir()} == {
        name: name for name in ("step_000002.jsonl", "step_000003.jsonl")
    }
    assert run.samples(1).is_file() and not run.samples(2).exists()
    run.samples(2).write_text("again")
    assert run.supersede_samples(2)[0].name == "superseded-2"
    assert run.supersede_samples(2) == []


def test_a_write_that_fails_leaves_the_old_file_and_nothing_aside(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_atomic(path, b"old", durable=True)

    def failing(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", failing)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_configuration_of_an_earlier_start_is_kept_when_it_differs(tmp_path):
    run_dir = RunDir.create("run", tmp_path / "run")
    run_dir.supersede_config(b"first")
    run_dir.config.write_bytes(b"first")
    run_dir.supersede_config(b"first")
    run_dir.supersede_config(b"second")
    kept = [path.name for path in run_dir.path.iterdir()]
    assert kept == ["config.superseded-1.toml"]
    assert (run_dir.path / kept[0]).read_bytes() == b"first"
