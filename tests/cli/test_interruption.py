"""Ctrl-C that compiled code loses on the way is still Ctrl-C."""

from __future__ import annotations

import signal

import pytest

from qhub.cli.interruption import interruptible


@pytest.fixture(autouse=True)
def usual():
    """Python's own handler: a shell that starts pytest in the background makes it ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def lost() -> None:
    """Do what compiled code does that asks Python for something and takes any failure for its own."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape") from None


def test_an_error_after_ctrl_c_is_ctrl_c():
    with pytest.raises(KeyboardInterrupt) as caught, interruptible():
        lost()
    assert isinstance(caught.value.__cause__, ValueError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_itself_and_other_errors_pass():
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(ValueError, match="plain"), interruptible():
        raise ValueError("plain")


def test_a_handler_of_somebody_else_stays():
    seen = []
    own = lambda number, frame: seen.append(number)  # noqa: E731
    signal.signal(signal.SIGINT, own)
    with interruptible():
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is own
    assert seen == [signal.SIGINT]
