"""How samples are split, and what a run's folder keeps."""

from dataclasses import replace
from pathlib import Path

import yaml

from affectgpt.config import DataConfig, R1Config
from affectgpt.pipeline import open_run, split_samples
from grpo_core.config.loader import to_dict
from grpo_core.config.options import RunConfig
from grpo_core.distributed import Distributed
from tests.affectgpt.answers import sample


def test_a_split_is_a_partition_that_the_seed_fixes():
    samples = [sample(str(i), None) for i in range(20)]
    training, validation = split_samples(samples, 0.25, seed=3)
    assert len(validation) == 5
    assert sorted(training + validation, key=samples.index) == samples
    assert split_samples(samples, 0.25, seed=3) == (training, validation)
    assert split_samples(samples, 0.25, seed=4) != (training, validation)


def test_a_run_goes_on_in_its_folder_and_another_one_moves_it_aside(tmp_path):
    def config(**run) -> R1Config:
        return R1Config(run=RunConfig(name="r", output_dir=tmp_path, **run))

    folder, previous = tmp_path / "r", tmp_path / "r.previous"
    open_run(config(), Distributed())
    (folder / "progress").write_text("half")
    open_run(config(max_steps=1000), Distributed())
    assert (folder / "progress").read_text() == "half"
    open_run(config(seed=1), Distributed())
    assert not (folder / "progress").exists()
    assert (previous / "progress").read_text() == "half"
    (folder / "summary.json").write_text("{}")
    open_run(config(seed=1), Distributed())
    assert (previous / "summary.json").exists()
    assert [path.name for path in Path(folder).iterdir()] == ["config.yaml"]
    (folder / "progress").write_text("half")
    open_run(replace(config(seed=1), run=replace(config(seed=1).run, resume=False)), Distributed())
    assert (previous / "progress").exists()


def test_a_run_whose_config_an_earlier_version_saved_goes_on(tmp_path):
    config = R1Config(
        data=DataConfig(format="synthetic", layout={"clips": (8, 2)}), run=RunConfig(name="r", output_dir=tmp_path)
    )
    saved = to_dict(config)
    # as it was saved: options of all layouts and of all loss types beside the others, no plug-ins
    del saved["data"]["layout"], saved["algorithm"]["loss"], saved["run"]["plugins"]
    saved["data"] |= {"subtitle_language": "english", "synthetic_clips": [8, 2]}
    saved["algorithm"] |= {"epsilon": None, "epsilon_high": None, "delta": None, "cispo_cap": 5.0}
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    (folder / "progress").write_text("half")
    open_run(config, Distributed())
    assert (folder / "progress").read_text() == "half"
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["layout"] == {"clips": [8, 2]}
    saved["data"]["synthetic_clips"] = [9, 2]
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    open_run(config, Distributed())
    assert not (folder / "progress").exists()
