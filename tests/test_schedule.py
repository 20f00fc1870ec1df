"""Durations and schedules against values worked out by hand."""

import math

import pytest

from megalens.config import LrScheduler, Schedule
from megalens.schedule import Clock, duration_steps, duration_text, lr_factor, parse_duration, schedule_value

CLOCK = Clock(steps_per_epoch=10, steps_per_update=4, total_steps=40)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("7s", 7),
        ("7", 7),
        (7, 7),
        ("7steps", 7),
        ("3os", 12),
        ("2e", 20),
        ("2 epochs", 20),
        ("0.5e", 5),
        ("0.25e", 2),
        ("0s", 0),
        (" 5 s ", 5),
        ("1e3s", 1000),
        ("1.5e3os", 6000),
        ("5e-1e", 5),
        (1e16, 10**16),
    ],
)
def test_durations_in_micro_steps(text, steps):
    assert duration_steps(text, CLOCK) == steps


@pytest.mark.parametrize("text", ["", "s", "-1s", "5x", "1.5s", "1.5os", "five", "1e-3s", "9" * 400, "1e999s", None])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match=r"duration|fractional"):
        parse_duration(text)


@pytest.mark.parametrize("number", [1.0, 3.0, 0.1, 0.00005, 1e6, 1234567.0, 1e16, 2.0**60])
def test_a_number_made_a_duration_is_read_back_to_the_last_digit(number):
    assert parse_duration(duration_text(number, "e")) == (number, "e")


def values(schedule, steps):
    return [schedule_value(schedule, step, CLOCK) for step in steps]


def test_constant_ignores_everything_else():
    assert values(Schedule(type="constant", value=0.1, start_value=9, end_value=9), [0, 39, 400]) == [0.1] * 3


def test_linear_ends_with_the_training_when_num_steps_is_minus_one():
    assert values(Schedule(type="linear", start_value=1.0, end_value=0.0), [0, 10, 20, 40, 50]) == pytest.approx([1, 0.75, 0.5, 0, 0])


def test_linear_after_a_hold_of_two_epochs():
    """The seed's temperature: 1.0 for 2 epochs (20 steps), then straight to 0.1 at the end (step 40)."""
    tau = Schedule(type="linear", start_value=1.0, end_value=0.1, constant_steps_before_decay="2e")
    assert values(tau, [0, 20, 30, 40]) == pytest.approx([1.0, 1.0, 0.55, 0.1])


def test_linear_over_optimizer_steps_stays_at_its_end():
    schedule = Schedule(type="linear", start_value=0.0, end_value=2.0, num_steps="2os")
    assert values(schedule, [0, 2, 4, 8, 39]) == pytest.approx([0, 0.5, 1, 2, 2])


def test_cosine_halves_at_the_middle():
    schedule = Schedule(type="cosine", start_value=1.0, end_value=0.0, num_steps="20s")
    assert values(schedule, [0, 5, 10, 20, 30]) == pytest.approx([1, 0.5 * (1 + math.sqrt(0.5)), 0.5, 0, 0])


def test_exponential_goes_in_equal_ratios():
    schedule = Schedule(type="exponential", start_value=8.0, end_value=1.0, num_steps="30s")
    assert values(schedule, [0, 10, 20, 30]) == pytest.approx([8, 4, 2, 1])


def test_a_hold_as_long_as_the_training_never_decays():
    schedule = Schedule(type="linear", start_value=1.0, end_value=0.0, constant_steps_before_decay="4e")
    assert values(schedule, [0, 39]) == [1.0, 1.0]


def factors(scheduler, steps):
    return [lr_factor(scheduler, step, CLOCK) for step in steps]


def test_warm_up_is_linear_and_ends_at_one():
    assert factors(LrScheduler(warmup_steps="10s", warmup_start_factor=0.1), [0, 5, 10, 39]) == pytest.approx([0.1, 0.55, 1, 1])


def test_no_warm_up_starts_at_one():
    assert factors(LrScheduler(), [0, 39]) == [1.0, 1.0]


def test_linear_rate_decays_after_the_warm_up():
    scheduler = LrScheduler(type="linear", warmup_steps="20s", warmup_start_factor=0.0, end_factor=0.5)
    assert factors(scheduler, [0, 10, 20, 30, 40]) == pytest.approx([0, 0.5, 1, 0.75, 0.5])


def test_cosine_rate_reaches_its_end_factor():
    assert factors(LrScheduler(type="cosine", end_factor=0.2), [0, 20, 40]) == pytest.approx([1, 0.6, 0.2])
