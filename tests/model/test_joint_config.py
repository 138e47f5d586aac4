import pytest

from silvershard.model.joint_config import JointConfig
from silvershard.model.training_config import TrainingConfig


def test_a_training_has_no_joint_phase_unless_it_is_asked_for() -> None:
    assert TrainingConfig().joint is None
    asked = TrainingConfig.model_validate({"joint": {"routing": 3.0}})
    assert asked.joint == JointConfig(routing=3.0)


def test_a_late_pull_is_refused_with_joint() -> None:
    with pytest.raises(ValueError, match=r"cluster_start must be 0 with joint, got 0\.5"):
        TrainingConfig(joint=JointConfig(), cluster_start=0.5)
