import pytest

from vfjax.merge import METHODS, register


def test_a_second_method_of_a_name_is_refused():
    before = dict(METHODS)

    def ties(members, *, scale: float = 1.0):
        return scale * members[0]

    with pytest.raises(ValueError, match=r"vfjax\.merge\.methods\.sparse has a method 'ties', too"):
        register()(ties)
    assert before == METHODS
