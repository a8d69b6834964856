import pytest
from packaging.requirements import Requirement

from helpers import environment
from helpers.environment import device, package_status, report, require, versions_line
from helpers.errors import InputError


@pytest.mark.parametrize(
    ("installed", "status"),
    [
        (None, "missing"),
        ("5.16.9", "too old"),
        ("5.17", "ok"),
        ("5.23.0", "ok"),
        ("5.24.0.dev0", "newer than tested"),
        ("5.24.0", "newer than tested"),
        ("6.1", "newer than tested"),
    ],
)
def test_status_of_a_version(installed, status):
    assert package_status(installed, ">=5.17,<5.24") == status


def test_local_build_of_torch_is_the_same_version():
    assert package_status("2.15.0+cpu", ">=2.9") == "ok"


def test_this_environment_fits():
    assert require().equals(report())
    assert {"torch", "transformers", "peft"} <= set(report().index)


@pytest.mark.parametrize(
    ("line", "said"), [("no-such-package>=1", "is missing"), ("numpy>=999", "is too old")]
)
def test_what_does_not_fit_is_named_with_the_remedy(monkeypatch, line, said):
    monkeypatch.setattr(environment, "declared_requirements", lambda: (Requirement(line),))
    with pytest.raises(InputError, match=rf"{Requirement(line).name} .*{said}.*make setup"):
        require()


def test_versions_line_names_the_subject_libraries_without_their_build():
    line = versions_line()
    assert [part.split()[0] for part in line.split(", ")] == ["torch", "transformers", "peft"]
    assert "+" not in line


def test_device_says_what_torch_would_use():
    facts = device()
    assert facts["device"] in ("cpu", "cuda", "mps")
    assert facts["torch_threads"] >= 1
