import re

import numpy as np
import pytest

from tests.vfjax.merge.families import F32
from vfjax import InputError
from vfjax.merge import METHODS, merge, register


@pytest.mark.parametrize(
    "method,params,message",
    [
        ("slurp", {}, "method: found 'slurp', expected "),
        ("slerp", {"t": "x"}, "slerp.t: found 'x', expected a finite number"),
        ("ties", {"weights": (1, 1), "density": (1, 2, 3)}, "expected a finite number, or 2 of"),
        ("ties", {"weights": (1, 1), "trim": "row"}, "expected 'tensor' or 'model'"),
        ("ties", {"weights": (1, 1), "density": 50}, "ties.density: found 50, expected a share"),
        (
            "breadcrumbs",
            {"weights": (1, 1), "gamma": (0.1, -1)},
            "gamma: found [0.1, -1.0], expected a share",
        ),
        ("sce", {"select_topk": 1.5}, "sce.select_topk: found 1.5, expected a share, 0 to 1"),
        ("passthrough", {}, "method passthrough: found 2 members, expected 1"),
        ("linear", {}, "method linear: found no 'weights', expected 2 finite numbers"),
        ("linear", {"weights": (1, 2, 3)}, "linear.weights: found (1, 2, 3), expected 2 finite"),
        ("linear", {"weights": 0.5}, "linear.weights: found 0.5, expected 2 finite"),
        ("linear", {"weights": "ab"}, "linear.weights: found 'ab', expected 2 finite"),
        ("linear", {"weights": (1, np.nan)}, "linear.weights: found (1, nan)"),
        ("linear", {"weights": (1, np.inf)}, "linear.weights: found (1, inf)"),
        ("linear", {"weights": (1, 1e39)}, "linear.weights: found (1, 1e+39)"),
        ("linear", {"weights": (1, True)}, "linear.weights: found (1, True)"),
        ("linear", {"weights": (1, 1), "normalize": 1}, "found 1, expected True or False"),
        ("linear", {"weights": (1, 1), "scale": 1.0}, "method linear: found parameter 'scale'"),
        ("task_arithmetic", {"weights": (1, 1), "scale": (1, 2)}, "expected a finite number"),
        ("task_arithmetic", {"weights": (1, 1)}, "method task_arithmetic: found no base"),
    ],
)
def test_wrong_parameters(method, params, message):
    with pytest.raises(InputError, match=re.escape(message)):
        merge(None, dict.fromkeys("ab", {"w": np.ones(4, F32)}), method, params)


def test_a_second_method_of_a_name_is_refused():
    before = dict(METHODS)

    def ties(members, *, scale: float = 1.0):
        return scale * members[0]

    with pytest.raises(ValueError, match=r"vfjax\.merge\.methods\.sparse has a method 'ties', too"):
        register()(ties)
    assert before == METHODS
