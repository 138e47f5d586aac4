import pytest

from silvershard.deploy.canary import ask_canary
from silvershard.deploy.errors import CommandError


def test_a_cluster_whose_first_question_is_not_answered_is_not_ready() -> None:
    with pytest.raises(CommandError, match="the first question was not answered: UNAVAILABLE"):
        ask_canary("127.0.0.1:1")
