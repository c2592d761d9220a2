"""The picture of scripts.calibrate_threshold: its labels do not stand on each other."""

import itertools

import numpy as np
import pytest

from blt_titan.commands.calibrate import _draw
from blt_titan.scoring.calibration import SEGMENT_PATCHES, Calibration, SegmentBudget

pytest.importorskip("matplotlib", reason="install the dev extra to draw")


@pytest.mark.parametrize("segment_patches", [512, 500, 10_000_000])
def test_tick_labels_do_not_overlap(segment_patches, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    lengths = np.random.default_rng(0).geometric(1 / 4.5, 10_000)
    calibration = Calibration("global", 1.3, None, lengths, 0)
    shares = [0.3, 0.2, 0.1]
    budgets = [SegmentBudget(n, 5 * n, *shares) for n in sorted({*SEGMENT_PATCHES, segment_patches})]
    _draw(tmp_path / "picture.png", calibration, budgets)
    figure = plt.gcf()
    try:
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
            labels = [text for text in axis.get_ticklabels(which="both") if text.get_text()]
            boxes = [text.get_window_extent() for text in labels]
            assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2)), [t.get_text() for t in labels]
        shown = [text.get_text() for text in figure.axes[1].get_xticklabels()]
        assert shown == [str(budget.patches) for budget in budgets]
    finally:
        monkeypatch.undo()
        plt.close(figure)
