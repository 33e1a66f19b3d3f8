"""Residuals are staged, committed or discarded, rescaled, and follow a range that is cut otherwise."""

from types import SimpleNamespace

import pytest
import torch

from ds_recsys.comm.error_feedback import ErrorFeedback


def _part(start, stop, name="weight"):
    return SimpleNamespace(name=name, start=start, stop=stop)


def _write(feedback, part, values, side="worker"):
    residual, error = getattr(feedback, side)(part)
    error.copy_(torch.as_tensor(values, dtype=torch.float32))
    return residual


def test_errors_become_residuals_only_when_the_step_is_committed():
    feedback = ErrorFeedback()
    assert _write(feedback, _part(0, 2), [1, 2]) is None
    feedback.commit()
    assert _write(feedback, _part(0, 2), [3, 4]).tolist() == [1, 2]
    feedback.discard()
    assert _write(feedback, _part(0, 2), [5, 6]).tolist() == [1, 2]
    feedback.commit()
    assert feedback.worker(_part(0, 2))[0].tolist() == [5, 6]


def test_the_error_never_overwrites_the_residual_that_is_read():
    feedback = ErrorFeedback()
    for step in range(5):
        residual = _write(feedback, _part(0, 3), [step] * 3)
        assert residual is None or residual.tolist() == [step - 1] * 3
        feedback.commit()


def test_a_range_that_is_reduced_twice_in_a_step_reads_what_it_wrote_in_it():
    feedback = ErrorFeedback()
    _write(feedback, _part(0, 2), [1, 1])
    feedback.commit()
    _write(feedback, _part(0, 2), [2, 2])
    assert _write(feedback, _part(0, 2), [3, 3]).tolist() == [2, 2]
    feedback.discard()
    assert feedback.worker(_part(0, 2))[0].tolist() == [1, 1]


def test_sides_and_names_are_apart():
    feedback = ErrorFeedback()
    _write(feedback, _part(0, 1), [1])
    _write(feedback, _part(0, 1), [2], side="server")
    _write(feedback, _part(0, 1, "bias"), [3])
    feedback.commit()
    assert feedback.worker(_part(0, 1))[0].item() == 1
    assert feedback.server(_part(0, 1))[0].item() == 2
    assert feedback.worker(_part(0, 1, "bias"))[0].item() == 3


def test_a_residual_follows_when_its_range_is_cut_otherwise():
    feedback = ErrorFeedback()
    _write(feedback, _part(0, 4), [0, 1, 2, 3])
    _write(feedback, _part(4, 6), [4, 5])
    feedback.commit()
    assert _write(feedback, _part(2, 5), [20, 30, 40]).tolist() == [2, 3, 4]
    feedback.commit()
    assert feedback.worker(_part(0, 6))[0].tolist() == [0, 1, 20, 30, 40, 5]


def test_residuals_follow_the_loss_scale():
    feedback = ErrorFeedback()
    feedback.scale = 8.0
    _write(feedback, _part(0, 2), [8, 16])
    feedback.commit()
    feedback.scale = 2.0
    residual = _write(feedback, _part(0, 2), [1, 1])
    assert (residual * feedback.multiplier).tolist() == [2, 4]
    feedback.discard()
    assert feedback.state_dict() == {("worker", "weight", 0, 2): pytest.approx(torch.tensor([1.0, 2.0]))}
    assert _write(feedback, _part(2, 3), [4]) is None
    feedback.commit()
    assert feedback.state_dict()[("worker", "weight", 0, 2)].tolist() == [1, 2]
    assert feedback.state_dict()[("worker", "weight", 2, 3)].tolist() == [2]


def test_state_dict_round_trip_is_exact():
    feedback, other = ErrorFeedback(), ErrorFeedback()
    values = torch.randn(100)
    _write(feedback, _part(0, 100), values)
    feedback.commit()
    other.load_state_dict(feedback.state_dict())
    assert torch.equal(other.worker(_part(0, 100))[0], values)


def test_switched_off_it_keeps_nothing():
    feedback = ErrorFeedback(enabled=False)
    assert feedback.worker(_part(0, 2)) == (None, None)
    feedback.commit()
    assert feedback.state_dict() == {}
