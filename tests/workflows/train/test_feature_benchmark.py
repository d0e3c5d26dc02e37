"""The benchmark of cached features, on a toy model."""

import argparse
from pathlib import Path

from helpers.tiny import MODEL


def test_the_benchmark_measures_both_sides(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    import feature_cache

    options = argparse.Namespace(head="linear", rows=64, batch_size=16, steps=2, epochs=3)
    model = {**MODEL, "text_cfg": {**MODEL["text_cfg"], "vocab_size": 49408}}
    times = feature_cache.measure(options, model)
    assert (len(times["cached"]), len(times["uncached"])) == (3, 2)
    assert min(times["cached"] + times["uncached"] + [times["computing"]]) > 0
    assert times["size"] > 1  # of 48 features, parameters and states are a large part
    monkeypatch.setattr(
        feature_cache,
        "measure",
        lambda *_: {"cached": [1e-4, 2e-4], "uncached": [0.05], "computing": 0.04, "size": 1.03},
    )
    feature_cache.report(options, model)
    lines = capsys.readouterr().out.splitlines()
    assert "per pair: RATIO 375 (250 to 500 in 2 runs; target at least 200: met)" in lines[-4]
    assert (
        "RATIO 0.375 (0.25 to 0.5" in lines[-3]
    )  # 3 million pairs at 0.15 ms take 7.5 minutes, two cores half of that
    assert lines[-2].endswith("The pass over an uncached epoch: RATIO 0.8 (1 run)")
    assert "RATIO 1.03 (1 run; target at most 1.05: met)" in lines[-1]
