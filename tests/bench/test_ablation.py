"""The ablation's report from runs whose judged clips are written by the test."""

import argparse
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from motif_jax import animation
from motif_jax.bench import ablation, ablation_report
from motif_jax.data import sprites
from motif_jax.errors import UserError
from motif_jax.training import weights

COUNT = 8


@pytest.fixture
def runs(tmp_path):
    """Two arms, two seeds, two checkpoints, and an arm of one each; `flow` always finds its way, the others for every other clip."""
    clips = sprites.make_clips("shapes", 1, range(COUNT), 8, 32, 32, "heldout")
    for arm, seeds, steps in (("none", "01", (100, 200)), ("flow", "01", (100, 200)), ("mask", "0", (100,))):
        for seed in seeds:
            run = tmp_path / arm / seed
            (run / "judged").mkdir(parents=True)
            (run / "config.json").write_text("{}")
            lines = [{"step": s, "eval/ratio": 2.5, "eval/ratio_t0": 2.0, "eval/ratio_t1": 4.0} for s in steps]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            good = (np.arange(COUNT) % 2 == 0) | (arm == "flow")
            measures = {
                n: np.ones(COUNT) for n in ("success", "wrong_object", "speed_ratio", "area_ratio", "others_drift", "leak", "presence")
            }
            measures |= {"still": np.zeros(COUNT), "background_psnr": np.full(COUNT, 25.0), "direction_ok": good.astype(float)}
            measures |= {"path_error": np.where(good, 0.01, 0.2)}
            for step in steps:
                (run / "checkpoints" / str(step)).mkdir(parents=True)
                for split in ablation.SPLITS if step == steps[-1] else ablation.ALONG:
                    path = run / "judged" / f"{step}_shapes_{split}_1_{COUNT}.npz"
                    np.savez(path, shown=clips["frames"][: ablation.SHOWN], **measures)
    return tmp_path


def test_report(runs):
    found = ablation.find_runs(runs)
    assert list(found) == [("none", "0"), ("none", "1"), ("flow", "0"), ("flow", "1"), ("mask", "0")]
    ablation.judge_runs(found, "shapes", 1, COUNT)  # all judged: loads no network, of which there is none
    result = ablation.summarise(found, "shapes", 1, COUNT)
    assert result["arms"]["none"]["splits"]["validation"][200]["direction_ok"]["mean"] == 0.5
    assert result["arms"]["flow"]["splits"]["heldout"][100]["direction_ok"]["mean"] == 1.0
    assert result["arms"]["flow"]["ratio"][200] == {"all": [2.5, 2.5], "0": [2.0, 2.0], "1": [4.0, 4.0]}
    ghosts = result["arms"]["none"]["splits"]["heldout"][200]["ghost"]
    assert ghosts["mean"] == ghosts["low"] == 0 < ghosts["high"]  # none of eight clips
    gap = result["pairs"][0]["heldout"]["ghost_difference"]
    assert gap["mean"] == 0 and gap["high"] == -gap["low"] == ghosts["high"]
    # What both arms of a pair have: seeds, and the last step.
    pairs = {(p["a"], p["b"]): p for p in result["pairs"]}
    assert {arms: (p["seeds"], p["step"]) for arms, p in pairs.items()} == {
        ("none", "flow"): (["0", "1"], 200),
        ("none", "mask"): (["0"], 100),
        ("flow", "mask"): (["0"], 100),
    }
    # Four of eight clips lost, four tied: a quarter of the wins.
    pair = pairs["none", "flow"]
    assert pair["heldout"]["motion"]["mean"] == 0.25 and pair["heldout"]["direction_ok_difference"]["mean"] == -0.5
    assert {s: e["mean"] for s, e in result["along"][0]["heldout"].items()} == {100: 0.5, 200: 0.5}
    text = ablation_report.write(runs, result, found, {})
    assert "Left out" not in text
    assert "| none | flow | 2 | 200 | 25 (25, 25) |" in text and "| mask | flow | 1 | 100 | 25 [" in text
    assert json.loads((runs / "report.json").read_text())["pairs"][0]["validation"]["strict"]["mean"] == 0.25
    page = (runs / "report.html").read_text()
    assert page.count("data:image/gif") == ablation.SHOWN and "Loss in the moving region over loss" in page
    assert (runs / "clips" / "00.png").stat().st_size > 0


@pytest.mark.filterwarnings("error")
def test_one_run_alone_is_a_report(runs):
    """Without a comparison."""
    for other in ("none", "mask", "flow/1"):
        shutil.rmtree(runs / other)
    ablation.run(arguments_of(runs))
    text = (runs / "report.md").read_text()
    assert "| flow | 1 | 200 | 100 [" in text and "| flow | - |" in text and "Gains and costs" not in (runs / "report.html").read_text()


def arguments_of(runs, only=""):
    return argparse.Namespace(runs=runs, only=only, count=COUNT, world="shapes", seed=1)


def test_a_diverged_run_is_named_and_the_others_are_compared(runs, monkeypatch, tiny):
    """One of two seeds of `flow` makes NaN at its last step, and its last ratios were not finite."""
    run = runs / "flow" / "1"
    (run / "judged" / f"200_shapes_heldout_1_{COUNT}.npz").unlink()
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().replace("2.5", "null"))
    config = tiny(data={"frames": 8, "height": 32, "width": 32})

    class Diverged(SimpleNamespace):
        def __call__(self, images, *_):
            raise animation.NotFiniteError("NaN", np.zeros((len(images), 8, 32, 32, 3), np.uint8), np.zeros(len(images), bool))

    monkeypatch.setattr(animation.Animator, "load", lambda path: Diverged(config=config))
    monkeypatch.setattr(weights, "load", lambda path: {"denoiser": {}})
    assert ablation.figure6([runs / "flow" / "0", run]) == {}
    with pytest.raises(UserError, match=r"^flow/1: NaN or infinity in the clips, so no result; train .* or move it elsewhere$"):
        ablation.run(arguments_of(runs))
    for name in ("report.md", "report.html"):
        assert "Left out, because their clips have NaN or infinity: flow/1 (step 200)." in (runs / name).read_text()
    assert {arm: row["seeds"] for arm, row in json.loads((runs / "report.json").read_text())["arms"].items()} == {
        "none": ["0", "1"],
        "flow": ["0"],
        "mask": ["0"],
    }


def test_ratios_that_were_not_finite_are_left_out(runs):
    """Of one bucket of one seed, and all of the other arm's: no claim about figure 6 holds."""
    for path, ratio in ((runs / "flow" / "1", "4.0"), (runs / "none" / "0", "2.5")):
        (path / "metrics.jsonl").write_text((path / "metrics.jsonl").read_text().replace(ratio, "null"))
    found = ablation.find_runs(runs)
    result = ablation.summarise(found, "shapes", 1, COUNT)
    assert result["arms"]["flow"]["ratio"][200] == {"all": [2.5, 2.5], "0": [2.0, 2.0]} and result["arms"]["none"]["ratio"] == {}
    assert not any(claim.startswith("figure 6") for claim, *_ in ablation_report.claims(result))
    result["arms"]["none"]["ratio"] = {200: {"all": [2.5, 2.5], "1": [4.0, 4.0]}}  # no bucket in common
    assert ["figure 6: flow below none at every timestep", "-", "no"] in ablation_report.claims(result)


def made_up(**ratios):
    """A result whose arms have these figure-6 ratios at one bucket, and whose pairs are given by the test."""
    arms = {arm: {"seeds": ["0", "1"], "ratio": {100: {"all": values, "0": values}}} for arm, values in ratios.items()}
    return {"arms": arms, "pairs": [], "along": []}


def test_claims_hold_only_when_all_seeds_and_the_whole_interval_say_so():
    result = made_up(none=[2.0, 2.4], flow=[1.0, 2.1], inverse=[2.5, 3.0])
    names = ("motion", "strict", *(f"{name}_difference" for name in ablation.DIFFERENCES))
    three = [0.0, 0.0, 0.0]
    flow = {n: {"mean": 0.6, "low": 0.4, "high": 0.8, "seeds": three} for n in names} | {
        "background_psnr_difference": {"mean": -1.0, "low": -2.0, "high": -0.5, "seeds": three}
    }
    inverse = {n: {"mean": -0.3, "low": -0.4, "high": -0.1, "seeds": three} for n in names}
    result["pairs"] = [{"a": "flow", "b": "none", "validation": flow, "heldout": flow}]
    result["pairs"] += [{"a": "inverse", "b": "none", "validation": inverse, "heldout": inverse}]
    rows = {claim: (measured, holds) for claim, measured, holds in ablation_report.claims(result)}
    # A seed of flow lies above one of none; inverse lies above both.
    assert rows["figure 6: flow below none at every timestep"] == ("gaps 0.65 to 0.65; largest difference of seeds 1.10", "no")
    assert rows["figure 6: none below inverse at every timestep"][1] == "yes"
    assert rows["direction, flow over none, seen, points"] == ("+60.0 [+40.0, +80.0]", "yes")
    assert rows["direction, none over inverse, never seen, points"] == ("+30.0 [+10.0, +40.0]", "yes")  # the pair turned around
    assert rows["flow preferred to none, motion rule, seen, %"] == ("60.0 [40.0, 80.0]", "not shown: the interval reaches it")
    assert rows["cost of flow over none: background, seen, dB"] == ("-1.00 [-2.00, -0.50]", "costs")
    assert rows["cost of flow over none: ghosts and smears, seen, points"][1] == "costs"


def test_two_seeds_have_no_interval_but_both_are_told():
    """Also where the pair is turned around."""
    result = made_up(none=[2.0, 2.4], flow=[1.0, 1.1])
    names = ("motion", "strict", *(f"{name}_difference" for name in ablation.DIFFERENCES))
    estimate = {"mean": 0.3, "low": 0.1, "high": 0.5, "seeds": [0.1, 0.5]}
    result["pairs"] = [{"a": "none", "b": "flow", "validation": dict.fromkeys(names, estimate), "heldout": dict.fromkeys(names, estimate)}]
    rows = {claim: (measured, holds) for claim, measured, holds in ablation_report.claims(result)}
    assert rows["flow preferred to none, motion rule, seen, %"] == ("70.0 (90.0, 50.0)", "not shown: the interval reaches it")
    assert rows["direction, flow over none, seen, points"] == ("-30.0 (-10.0, -50.0)", "no")
    assert ablation_report.verdict(estimate, 0.0) == "yes, in these two seeds"
    assert ablation_report.cell(estimate | {"seeds": [0.1, None]}, 100, ".0f") == "30 (10, -)"


def test_arms_are_compared_within_their_backbone():
    result = made_up(none=[1], flow=[1], cx_attn=[1], dit_none=[1], dit_flow=[1])
    assert ablation.families(result) == ["", "dit_"]
    compared = {arm: ablation.reference(result, arm) for arm in result["arms"]}
    assert compared == {"none": "flow", "flow": "flow", "cx_attn": "flow", "dit_none": "dit_flow", "dit_flow": "dit_flow"}
    assert ablation.reference(made_up(none=[1], mask=[1]), "mask") == "none"


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"launch/ablation\.sh"):
        ablation.find_runs(tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint"):
        ablation.steps_of(tmp_path)


def test_a_seed_that_stopped_early_is_named(runs, monkeypatch):
    """Before anything is judged; alone it may be judged."""
    shutil.rmtree(runs / "flow" / "1" / "checkpoints" / "200")
    judged = []
    monkeypatch.setattr(ablation, "judge_runs", lambda found, *_: judged.append(list(found)) or {})
    with pytest.raises(UserError, match=r"flow/1: ends at step 100, another seed of flow at 200"):
        ablation.run(arguments_of(runs))
    ablation.run(arguments_of(runs, "flow/1"))
    assert judged == [[("flow", "1")]]
