import tomllib
from pathlib import Path

import pytest
from keras_runs import BACKEND, keras

from smartfrz.adapters.keras.versions import (
    NEWEST,
    OLDEST,
    check_version,
    find_absent_attributes,
    list_private_attributes,
)
from smartfrz.errors import MissingDependencyError


def test_the_installed_keras_has_what_is_needed():
    needed = list_private_attributes(BACKEND)
    assert find_absent_attributes(needed) == []
    assert ("jax_state_sync" in str(needed)) == (BACKEND == "jax")
    assert OLDEST <= tuple(int(part) for part in keras.__version__.split(".")[:2]) <= NEWEST


@pytest.mark.parametrize(
    ("path", "attribute", "absent"),
    [
        ("keras.layers.Layer", "_no_such_list", ["Layer._no_such_list"]),
        ("keras.optimizers.Optimizer", "_var_kez", ["Optimizer._var_kez"]),
        ("keras.layers.NoSuchLayer", "call", ["NoSuchLayer.call"]),
        ("keras.src.no_such_module.Layer", "call", ["Layer.call"]),
        ("keras.optimizers.Optimizer", "_var_key", []),  # a method
        ("keras.optimizers.Optimizer", "_iterations", []),  # set when one is made
        ("keras.Model", "_trainable_variables", []),  # of the class that it inherits from
    ],
)
def test_what_a_keras_lacks_is_named(path, attribute, absent):
    assert find_absent_attributes({path: (attribute,)}) == absent


def test_a_keras_that_lacks_something_is_refused():
    message = (
        r"private attributes that Keras 3\.16\.0 does not have: Optimizer\._var_key, Layer\._layers\. "
        r'It was tested with Keras 3\.12 to 3\.15\. .*pip install "keras>=3\.12,<3\.16"'
    )
    with pytest.raises(MissingDependencyError, match=message):
        check_version("3.16.0", ["Optimizer._var_key", "Layer._layers"])


@pytest.mark.parametrize("found", ["3.11.3", "3.16.0", "3.16.0.dev2026", "4.0"])
def test_a_keras_that_was_not_tested_is_warned_of(found):
    with pytest.warns(
        UserWarning, match=rf"was tested with Keras 3\.12 to 3\.15; found {found}, .*keras>=3\.12,<3\.16"
    ):
        check_version(found, [])


@pytest.mark.parametrize("found", ["3.12.0", "3.15.1", "3.15.1.dev0"])
def test_a_tested_keras_is_taken_without_a_word(found):
    check_version(found, [])


def test_the_bounds_are_those_of_the_package():
    project = Path(__file__).parent.parent / "pyproject.toml"
    if not project.exists():
        pytest.skip("the tests are not in a checkout")
    extras = tomllib.loads(project.read_text("utf-8"))["project"]["optional-dependencies"]
    assert f"keras>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}" in extras["keras"]
