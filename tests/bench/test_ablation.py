"""The ablation's report from runs whose judged clips are written by the test."""

import json

import numpy as np
import pytest

from motif_jax.bench import ablation, ablation_report
from motif_jax.config import UserError
from motif_jax.data import sprites

COUNT = 8


@pytest.fixture
def runs(tmp_path):
    """Two arms, two seeds, two checkpoints; `flow` always finds its way, `none` for every other clip."""
    clips = sprites.make_clips("shapes", 1, range(COUNT), 8, 32, 32, "heldout")
    for arm in ("none", "flow"):
        for seed in ("0", "1"):
            run = tmp_path / arm / seed
            (run / "judged").mkdir(parents=True)
            (run / "config.json").write_text("{}")
            lines = [{"step": s, "eval/ratio": 2.5, "eval/ratio_t0": 2.0, "eval/ratio_t1": 4.0} for s in (100, 200)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            good = (np.arange(COUNT) % 2 == 0) | (arm == "flow")
            measures = {
                n: np.ones(COUNT) for n in ("success", "wrong_object", "speed_ratio", "area_ratio", "others_drift", "leak", "presence")
            }
            measures |= {"still": np.zeros(COUNT), "background_psnr": np.full(COUNT, 25.0), "direction_ok": good.astype(float)}
            measures |= {"path_error": np.where(good, 0.01, 0.2)}
            for step in (100, 200):
                (run / "checkpoints" / str(step)).mkdir(parents=True)
                for split in ablation.SPLITS:
                    path = run / "judged" / f"{step}_shapes_{split}_1_{COUNT}.npz"
                    np.savez(path, shown=clips["frames"][: ablation.SHOWN], **measures)
    return tmp_path


def test_report(runs):
    found = ablation.find_runs(runs)
    assert list(found) == [("none", "0"), ("none", "1"), ("flow", "0"), ("flow", "1")]
    ablation.judge_runs(found, "shapes", 1, COUNT)  # all judged: loads no network, of which there is none
    result = ablation.summarise(found, "shapes", 1, COUNT)
    assert result["arms"]["none"]["splits"]["validation"]["direction_ok"]["mean"] == 0.5
    assert result["arms"]["flow"]["curve"][100]["direction_ok"]["mean"] == 1.0
    assert result["arms"]["flow"]["ratio"][200] == {"all": [2.5, 2.5], "0": [2.0, 2.0], "1": [4.0, 4.0]}
    (pair,) = result["pairs"]
    assert (pair["a"], pair["b"], pair["seeds"]) == ("none", "flow", ["0", "1"])
    # Four of eight clips lost, four tied: a quarter of the wins.
    assert pair["heldout"]["motion"]["mean"] == 0.25 and pair["heldout"]["direction_difference"]["mean"] == -0.5
    text = ablation_report.write(runs, result, found)
    assert "| none over flow | 2 | 25.0 [" in text
    assert json.loads((runs / "report.json").read_text())["pairs"][0]["validation"]["strict"]["mean"] == 0.25
    page = (runs / "report.html").read_text()
    assert page.count("data:image/gif") == ablation.SHOWN and "Loss in the moving region over loss" in page
    assert (runs / "clips" / "00.png").stat().st_size > 0


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"launch/ablation\.sh"):
        ablation.find_runs(tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint"):
        ablation.steps_of(tmp_path)
