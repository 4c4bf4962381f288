from pathlib import Path

from tests.architecture import sizes


def test_no_file_function_nesting_or_parameter_list_is_over_its_limit() -> None:
    assert sizes.violations(sizes.measure_tree()) == []


def test_the_report_names_what_is_too_large(tmp_path: Path) -> None:
    headers = ("if a:", "if b:", "if c:", "while d:", "pass")
    deep = "".join("    " * depth + header + "\n" for depth, header in enumerate(headers, 1))
    body = "\n".join(["    x = 1"] * 60)
    path = tmp_path / "big.py"
    path.write_text(f"def long(a, b, c, d, e, f, g, h):\n{body}\ndef deep(a, b, c, d):\n{deep}")
    found = sizes.violations(list(sizes.measure_file(path, "big.py")))
    assert found == [
        "big.py:1 long: lines of a function 61 > 60",
        "big.py:1 long: parameters 8 > 7",
        "big.py:62 deep: nesting 4 > 3",
    ]


def test_elif_is_not_nesting_and_keyword_only_constructor_arguments_do_not_count(
    tmp_path: Path,
) -> None:
    path = tmp_path / "fine.py"
    path.write_text(
        "class A:\n"
        "    def __init__(self, a, b, c, d, e, f, g, *, h, i):\n"
        "        if a:\n            pass\n        elif b:\n            pass\n"
        "        elif c:\n            pass\n        elif d:\n            pass\n"
    )
    assert sizes.violations(list(sizes.measure_file(path, "fine.py"))) == []


def test_a_file_that_is_no_python_is_a_violation(tmp_path: Path) -> None:
    path = tmp_path / "torn.py"
    path.write_text("x = 1\ny = [\n")
    assert sizes.violations(list(sizes.measure_file(path, "torn.py"))) == [
        "torn.py:2: syntax errors 1 > 0"
    ]
