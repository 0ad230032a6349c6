"""Users without a home, and where files of cptool's own go for them."""

import os
import pwd
from pathlib import Path

import pytest

from cptool.checkpoint import open_checkpoint
from cptool.errors import UserError
from cptool.files import cache_dir, expanded
from cptool.planning import profiles
from cptool.planning.profiles import check_place, is_measured


@pytest.fixture
def homeless(monkeypatch):
    """Imitate a container whose user has no entry in /etc/passwd."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "CPTOOL_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_home_what_needs_none_works_and_what_does_names_the_variable(homeless):
    assert profiles.load_profile("cpu") == profiles.default_profile("cpu")
    assert not is_measured()
    for needs_one, variable in (
        (cache_dir, "CPTOOL_CACHE"),
        (check_place, "CPTOOL_CACHE"),
        (lambda: open_checkpoint("smollm2-135m-instruct"), "CPTOOL_CACHE"),
        (lambda: open_checkpoint("organisation/model"), "HF_HOME"),
    ):
        with pytest.raises(UserError, match=f"user id {os.getuid()} .* set {variable} to a dir"):
            needs_one()


def test_a_cache_by_name(homeless, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "cptool"
    monkeypatch.setenv("CPTOOL_CACHE", "here")
    assert cache_dir() == Path.cwd() / "here"
    monkeypatch.delenv("CPTOOL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says its specification
    assert cache_dir() == tmp_path / ".cache/cptool"


def test_a_home_that_is_no_directory(monkeypatch):
    monkeypatch.delenv("CPTOOL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    assert not is_measured()
    with pytest.raises(UserError, match="/dev/null cannot be written to; set CPTOOL_CACHE"):
        check_place()


def test_a_home_that_nobody_has():
    for path in ("~nobody-of-this-name", "~nobody-of-this-name/model"):
        with pytest.raises(UserError, match="write the path in full"):
            expanded(path)
