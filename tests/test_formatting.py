import pytest

from coalign.formatting import duration, percent


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.36, "0.36 s"),
        (0.0014, "0.0014 s"),
        (0.999, "1 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (12_000, "3 h 20 min"),
        (187_300, "2 d 4 h"),
        (1e8, "1,157 d 9 h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0.0, "0.0 %"),
        (0.2141, "21.4 %"),
        (1.0, "100.0 %"),
        (0.0096, "1.0 %"),
        (0.0094, "0.94 %"),
        (2e-6, "0.0002 %"),
        (-0.123, "-12.3 %"),
        (-0.0021, "-0.21 %"),
    ],
)
def test_percent(fraction, text):
    assert percent(fraction) == text
