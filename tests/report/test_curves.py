from __future__ import annotations

import pytest

from coalign.report import curves


@pytest.mark.parametrize(
    ("keys", "families"),
    [
        # a key and what begins like it
        (["scale_a_b", "scale", "scale_c_c"], {"scale": ["scale_a_b", "scale", "scale_c_c"]}),
        # three or more that begin alike, by as many words as they can
        (["shift_x_y", "shift_x_z", "shift_y_y"], {"shift": ["shift_x_y", "shift_x_z", "shift_y_y"]}),
        (["a_b_1", "a_b_2", "a_b_3", "a_c"], {"a_b": ["a_b_1", "a_b_2", "a_b_3"], "a_c": ["a_c"]}),
        # two that begin alike may be as different as a share and a count
        (["queue_fill", "queue_age"], {"queue_fill": ["queue_fill"], "queue_age": ["queue_age"]}),
        (["log_distance", "logit_scale", "lambda"], {n: [n] for n in ("log_distance", "logit_scale", "lambda")}),
        # a scope says it
        (["tau/a", "b", "tau/c"], {"tau": ["tau/a", "tau/c"], "b": ["b"]}),
        (["tau/a"], {"tau/a": ["tau/a"]}),
        ([], {}),
    ],
)
def test_families(keys, families):
    found = curves.families(keys)
    assert found == families
    assert list(found) == list(families)  # in the order of the log


def test_every_key_is_in_one_panel():
    keys = [
        "loss",
        "loss/one",
        "loss/two",
        "lr",
        "grad_norm",
        "logit_scale_a_a",
        "logit_scale",
        "queue_fill",
        "pairs_per_second",
        "data_wait",
    ]
    rows = [{"step": step, "epoch": 0.1, "seconds": 2.0, **{key: float(step) for key in keys}} for step in range(3)]
    rows.append({"step": 2, "val/loss": 1.0, "val/image_to_text_r10": 0.5, "val/zero_shot_acc1": 0.25})
    panels = {panel.title: panel for panel in curves.panels(rows)}
    assert {title: list(panel.series) for title, panel in panels.items()} == {
        "Loss": ["training loss", "held-out loss"],
        "Recall and accuracy": ["image → text R@10", "zero shot acc1"],
        "Learning rate": ["Learning rate"],
        "Gradient norm": ["Gradient norm"],
        "Term: one": ["Term: one"],
        "Term: two": ["Term: two"],
        "Logit scale": ["a a", "logit scale"],
        "Queue fill": ["Queue fill"],
        "Pairs per second": ["Pairs per second"],
        "Time waiting for data": ["Time waiting for data"],
    }
    assert [title for title, panel in panels.items() if not panel.small] == list(panels)[:4]
    assert [title for title, panel in panels.items() if panel.percent] == [
        "Recall and accuracy",
        "Time waiting for data",
    ]
    steps, values = panels["Term: two"].series["Term: two"]
    assert (steps.tolist(), values.tolist()) == ([0, 1, 2], [0, 1, 2])
