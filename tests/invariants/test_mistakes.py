"""Mistakes as users make them: each is one sentence with the name and the way out, status 2, before weights load."""

from __future__ import annotations

import resource
import runpy
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import PreTrainedModel

from affectgpt.cli import main

ROOT = Path(__file__).parents[2]
TRAIN = "affectgpt train --data.format mer2025 --data.root {data} --run.output_dir {runs}"
SFT = "affectgpt sft --data.root {data} --run.output_dir {runs}"
MODEL = "--model.llm {llm} --model.visual_encoder {clip} --model.audio_encoder {hubert}"
TEXT = "recipes/examples/text_grpo.py --run.output_dir {runs} --run.prompts_per_step 2"
REWARDED = f"{TEXT} --reward {{here}}/rewards.py:good"


class Mistake(NamedTuple):
    """A command, with places in braces, and what the sentence must say: what is wrong, and what to do."""

    command: str
    says: tuple[str, ...]


OPTIONS = [  # refused before torch is imported
    Mistake("affectgpt trian", ("trian", "did you mean 'train'")),
    Mistake("affectgpt train --algorithm.bta 1", ("algorithm.bta", "did you mean 'algorithm.beta'")),
    Mistake("affectgpt train --config nope", ("--config nope", "the configs are")),
    Mistake("affectgpt train --config {here}/cut.yaml", ("cut.yaml:2", "not valid YAML")),
    Mistake("affectgpt train --config {here}/unknown.yaml", ("unknown.yaml:2", "did you mean 'algorithm.beta'")),
    Mistake("affectgpt train --config {here}/twice.yaml", ("twice.yaml:2", "appears twice")),
    Mistake("affectgpt train --rollout.group_size 1", ("rollout.group_size is 1", "2 or more")),
    Mistake("affectgpt train --rollout.group_size four", ("rollout.group_size", "'four'", "an integer")),
    Mistake("affectgpt train --rollout.temperature -1", ("rollout.temperature is -1", "0 (greedy)")),
    Mistake("affectgpt train --rollout.top_p 1.5", ("rollout.top_p is 1.5", "at most 1")),
    Mistake("affectgpt train --run.max_steps 0", ("run.max_steps is 0", "1 or more")),
    Mistake("affectgpt train --run.max_steps -3", ("run.max_steps is -3", "1 or more")),
    Mistake("affectgpt train --run.prompts_per_step 0", ("run.prompts_per_step is 0", "1 or more")),
    Mistake("affectgpt train --run.seed -1", ("run.seed is -1", "from 0")),
    Mistake("affectgpt train --model.lora_r 0", ("model.lora_r is 0", "1 or more")),
    Mistake("affectgpt sft --model.lora_dropout 1.5", ("model.lora_dropout is 1.5", "[0, 1)")),
    Mistake("affectgpt train --run.name ../x", ("run.name is '../x'", "one plain name")),
    Mistake("affectgpt train --run.name=", ("run.name is ''", "one plain name")),
    Mistake("affectgpt train --learning_rate 1e-5", ("--optim.learning_rate", "write one of them")),
    Mistake("affectgpt train --optim.learning_rate -1", ("optim.learning_rate is -1", "set it")),
    Mistake("affectgpt train --algorithm.loss_type gpro", ("algorithm.loss_type", "'gpro'", "grpo")),
    Mistake("affectgpt train --loss_type cispo --epsilon 0.2", ("algorithm.loss.epsilon", "cispo_cap")),
    Mistake("affectgpt train --reward.names accuracies", ("accuracies", "choose among")),
    Mistake("affectgpt train --metric.level 3", ("metric.level", "'3'", "1, 2")),
    Mistake("affectgpt train --plugins {here}/none.py", ("run.plugins", "none.py", "no file")),
    Mistake("affectgpt train --data.format mer2024", ("data.format", "'mer2024'", "mer2025")),
    Mistake("affectgpt sft --run.resume maybe", ("run.resume", "'maybe'", "true or false")),
    Mistake("affectgpt ablations --algorithm.bta 1", ("algorithm.bta", "did you mean 'algorithm.beta'")),
    Mistake("affectgpt train --config demo_think --reward.names accuracy,judge", ("judge", "choose among")),
]
FILES = [  # refused before a weight is read
    Mistake(f"{TRAIN} --model.path {{here}}/none", ("model.path", "{here}/none", "AffectGPT.save_pretrained")),
    Mistake(f"{TRAIN} --model.path {{llm}}", ("affectgpt.json", "{llm}", "give it as model.llm")),
    Mistake(TRAIN, ("model.llm is not set", "give model.path")),
    Mistake(f"{TRAIN} {MODEL} --model.llm Qwen/Qwen2.5-7B", ("model.llm", "Qwen/Qwen2.5-7B", "nothing is downloaded")),
    Mistake(f"{TRAIN} {MODEL} --model.llm {{hubert}}", ("model.llm", "{hubert}", "tokenizer")),
    Mistake(f"{TRAIN} {MODEL} --model.visual_encoder {{hubert}}", ("model.visual_encoder", "'hubert'", "CLIP")),
    Mistake(f"{SFT} {MODEL} --data.root {{here}}/none", ("{here}/none", "no such folder", "dataset's root")),
    Mistake(f"{SFT} {MODEL} --data.labels none.csv", ("none.csv", "no such file")),
    Mistake(f"{SFT} {MODEL} --data.labels columns.csv", ("columns.csv", "no column openset", "name, labels")),
    Mistake(f"{SFT} {MODEL} --data.labels twice.csv", ("twice.csv", "'a' appears twice")),
    Mistake(f"{SFT} {MODEL} --data.labels unclosed.csv", ("unclosed.csv", "line 2")),
    Mistake(f"{SFT} {MODEL} --data.test_labels none.csv", ("none.csv", "no such file")),
    Mistake("affectgpt sft", ("data.root is not set",)),
    Mistake(f"{SFT} {MODEL} --run.output_dir {{here}}/rewards.py", ("{here}/rewards.py", "not a folder", "output_dir")),
    Mistake(f"{SFT} {MODEL} --run.output_dir {{here}} --run.name project", ("project", "would overwrite", "run.name")),
    Mistake(f"{TRAIN} --reward.names {{here}}/rewards.py:god", ("rewards.py", "'god'", "did you mean 'good'")),
    Mistake(f"{TRAIN} --reward.names {{here}}/rewards.py:number", ("rewards.py:number", "cannot be called")),
    Mistake(f"{TRAIN} --reward.names {{here}}/none.py:good", ("none.py", "no file")),
    Mistake(f"{TRAIN} --metric.emotion_wheel {{here}}/none", ("{here}/none/wheel1.xlsx", "is missing")),
    Mistake("affectgpt evaluate --model.path {here}/none --data.root {data}", ("model.path", "{here}/none")),
    Mistake("affectgpt predict --model.path {here}/none --data.root {data}", ("model.path", "{here}/none")),
    Mistake("affectgpt predict --output {here}/old.csv", ("output: {here}/old.csv", "another --output")),
    Mistake("affectgpt predict --output {here}/a.jsonl", ("output is {here}/a.jsonl", "end in .csv")),
    Mistake("affectgpt report {here}/none", ("{here}/none/metrics.jsonl", "a training run wrote")),
    Mistake(f"{REWARDED} --model {{here}}/none --data {{here}}/good.jsonl", ("model", "{here}/none", "no folder")),
    Mistake(f"{REWARDED} --model {{cut}} --data {{here}}/good.jsonl", ("{cut}", "cut")),
    Mistake(f"{REWARDED} --model {{llm}} --data {{here}}/none.jsonl", ("{here}/none.jsonl",)),
    Mistake(f"{REWARDED} --model {{llm}} --data {{here}}", ("{here}", "a folder, not a file")),
    Mistake(
        f"{REWARDED} --model {{llm}} --data {{here}}/table.parquet",
        ("table.parquet", "a parquet file", "one JSON object per line"),
    ),
    Mistake(f"{REWARDED} --model {{llm}} --data {{here}}/broken.jsonl", ("broken.jsonl, line 2", "JSON")),
    Mistake(f"{REWARDED} --model {{llm}} --data {{here}}/number.jsonl", ("number.jsonl, line 1", "prompt")),
    Mistake(f"{REWARDED} --model {{llm}} --data {{here}}/empty.jsonl", ("empty.jsonl",)),
    Mistake(f"{REWARDED} --model {{llm}} --data {{here}}/one.jsonl", ("prompts_per_step is 2", "has 1", "lower")),
    Mistake(f"{TEXT} --model {{llm}} --data {{here}}/good.jsonl --reward good", ("'good'", "file.py:name")),
    Mistake(f"{REWARDED} --model {{llm}} --data {{here}}/good.jsonl --lora_r -1", ("lora_r is -1", "0 (all weights")),
    Mistake(
        f"{REWARDED},{{here}}/rewards.py:good --model {{llm}} --data {{here}}/good.jsonl",
        ("share a name: good, good", "rename one"),
    ),
    Mistake(
        f"{TEXT} --model {{llm}} --data {{here}}/good.jsonl --reward {{here}}/rewards.py:needs",
        ("rewards.py:needs", "'wanted'", "Rename the parameter"),
    ),
    Mistake(f"{TEXT} --model {{llm}} --data {{here}}/good.jsonl", ("reward must be given", "add --reward")),
    Mistake(
        f"{REWARDED} --model {{llm}} --data {{here}}/good.jsonl --algorithm.reward_weights.god 1",
        ("algorithm.reward_weights.god", "this run has good"),
    ),
]
# a start of Python and of torch is not to be had ten times over for every one of them
AS_PROCESSES = [*OPTIONS[:6], FILES[0], FILES[6], FILES[24], FILES[29]]


@pytest.fixture(scope="module")
def places(tiny_llm_folder, tiny_clip_folder, tiny_hubert_folder, tmp_path_factory) -> dict[str, str]:
    """Folders and files that the commands name."""
    here = tmp_path_factory.mktemp("mistakes")
    files = {
        "cut.yaml": "algorithm: [1\n",
        "unknown.yaml": "algorithm:\n  bta: 1\n",
        "twice.yaml": "algorithm:\n  beta: 1\n  beta: 2\n",
        "rewards.py": "def good(completion): return 1.0\ndef needs(completion, wanted): return 1.0\nnumber = 3\n",
        "good.jsonl": '{"prompt": "a"}\n{"prompt": "b"}\n',
        "broken.jsonl": '{"prompt": "a"}\n{"prompt": \n',
        "number.jsonl": '{"prompt": 5}\n',
        "one.jsonl": '{"prompt": "a"}\n',
        "empty.jsonl": "",
        "table.parquet": "PAR1",
        "old.csv": "name,openset\na,[happy]\n",
        "project/model": "a file of the user's",
        "data/columns.csv": "name,labels\na,[happy]\n",
        "data/twice.csv": 'name,openset\na,"[happy]"\na,"[sad]"\n',
        "data/unclosed.csv": 'name,openset\na,"[happy]\nb,"[sad]"\n',
        "data/track2_train_ovmerd.csv": 'name,openset\na,"[happy]"\nb,"[sad]"\n',
        "data/track3_train_ovmerd.csv": "name,reason\na,so\nb,so\n",
        "data/track2_test.csv": 'name,openset\na,"[happy]"\n',
        "data/subtitle_chieng.csv": "name,chinese,english\na,,x\nb,,y\n",
    }
    for name, text in files.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(text)
    (here / "data/video").mkdir()
    cut = shutil.copytree(tiny_llm_folder, here / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert struct.unpack("<Q", weights.read_bytes()[:8])[0] < weights.stat().st_size  # the header is whole
    folders = {"here": here, "data": here / "data", "runs": here / "runs", "cut": cut}
    folders |= {"llm": tiny_llm_folder, "clip": tiny_clip_folder, "hubert": tiny_hubert_folder}
    return {name: str(path) for name, path in folders.items()}


def words(command: str, places: dict[str, str]) -> list[str]:
    return [word.format(**places) for word in command.split()]


def check(mistake: Mistake, places: dict[str, str], status: object, errors: str) -> None:
    assert status == 2, errors[-3000:]
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert lines[0] == errors.rstrip("\n").splitlines()[-1]
    for text in mistake.says:
        assert text.format(**places) in lines[0]
    assert "Errno" not in lines[0]


def test_there_are_fifty():
    assert len({mistake.command for mistake in OPTIONS + FILES}) == len(OPTIONS + FILES) >= 50
    assert len(AS_PROCESSES) >= 10


@pytest.mark.parametrize("mistake", OPTIONS + FILES, ids=lambda mistake: mistake.command)
def test_a_mistake_is_one_sentence(mistake, places, monkeypatch, capsys, tmp_path):
    def read_weights(*arguments, **options):
        raise AssertionError("weights were read before the mistake was found")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", read_weights)
    monkeypatch.chdir(tmp_path)
    program, *arguments = words(mistake.command, places)
    before = sorted(Path(places["here"]).rglob("*"))
    try:
        if program == "affectgpt":
            status: object = main(arguments)
        else:
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            runpy.run_path(str(ROOT / program), run_name="__main__")
            status = 0
    except SystemExit as leaving:
        status = leaving.code
    check(mistake, places, status, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())  # nothing is made, nor moved
    assert sorted(Path(places["here"]).rglob("*")) == before


@pytest.mark.parametrize("mistake", AS_PROCESSES, ids=lambda mistake: mistake.command)
def test_a_mistake_ends_a_process_with_status_2(mistake, places, tmp_path):
    program, *arguments = words(mistake.command, places)
    start = ["-m", "affectgpt"] if program == "affectgpt" else [str(ROOT / program)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *start, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    check(mistake, places, done.returncode, done.stderr)
    if mistake in OPTIONS:  # seconds of the processor, which do not depend on what else runs
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
