"""The reference page is what the table says."""

from pathlib import Path

from dovetail.hooks import HOOKS
from dovetail.hooks.docs import main, page

PAGE = Path(__file__).parents[3] / "docs" / "hooks.md"


def test_the_page_is_fresh():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m dovetail.hooks.docs docs/hooks.md"


def test_the_page_has_every_hook_with_its_forms_and_example(tmp_path):
    assert main([str(tmp_path / "page.md")]) == 0
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    for spec in HOOKS:
        assert f"`{spec.flag}`" in text and spec.example in text
        assert all(f"`{form.signature}`" in text for form in spec.forms)
