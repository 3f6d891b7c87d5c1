"""The shipped data folders are found from a checkout and from an install."""

import pytest

from quantkit import resources
from quantkit.errors import QuantkitError
from quantkit.resources import resource


def test_checkout_has_them_beside_the_package():
    assert resource("calibration", "eval", "demo.txt") == resources.PACKAGE.parent / "calibration" / "eval" / "demo.txt"
    assert resource("recipes").is_dir()


def test_install_has_them_inside_whatever_lies_beside(tmp_path, monkeypatch):
    package = tmp_path / "quantkit"
    inside = package / "_data" / "recipes"
    inside.mkdir(parents=True)
    (tmp_path / "recipes").mkdir()  # another distribution's package in the same site-packages
    monkeypatch.setattr(resources, "PACKAGE", package)
    assert resource("recipes") == inside


def test_what_is_missing_says_to_reinstall(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "PACKAGE", tmp_path / "quantkit")
    with pytest.raises(QuantkitError, match=r"recipes.*reinstall"):
        resource("recipes", "balanced.yaml")
