"""Make, train and save a tiny LLM and tiny encoders, in folders that `from_pretrained` reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

MODELS_VERSION = 4  # raise it when the same seed gives other models


class TinyModels(NamedTuple):
    """Folders of the three models; that of the LLM holds its tokenizer too."""

    llm: Path
    visual: Path
    audio: Path


def make_tiny_models(folder: str | Path, *, seed: int = 0) -> TinyModels:
    """Make a tiny Qwen2 with tokenizer, CLIP image tower and HuBERT under `folder`, unless they are there already.

    Weights depend on the seed only: everything runs on one thread, the encoders in a process beside the LLM's. A folder
    whose manifest has the same seed and version is left unchanged.

    Raises:
        FileExistsError: the folder holds something else, or other tiny models, which a trained adapter may need.
    """
    folder = Path(folder)
    models = TinyModels(folder / "llm", folder / "visual", folder / "audio")
    manifest = {"made_by": "affectgpt.synthetic", "models_version": MODELS_VERSION, "seed": seed}
    mark, began = folder / "manifest.json", folder / "manifest.partial.json"
    if mark.is_file():
        found = json.loads(mark.read_text())
        if found == manifest:
            return models
        raise FileExistsError(
            f"{folder} holds tiny models of another seed or version ({found}): name an empty or a new folder"
        )
    if folder.exists() and any(folder.iterdir()) and not began.is_file():
        raise FileExistsError(f"{folder} holds files that are not tiny models: name an empty or a new folder")
    for part in models:  # of an interrupted run
        shutil.rmtree(part, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    # marks the folder as ours until the manifest does: an interrupted run's files may be deleted by the next
    began.write_text(json.dumps(manifest))
    command = [sys.executable, "-m", "affectgpt.synthetic", "encoders", str(folder), "--seed", str(seed)]
    # a process, because torch's thread count and generator are global: both trainings have to be repeatable
    child = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        make_llm_folder(models.llm, seed)
    finally:
        code = child.wait()
    if code:
        raise RuntimeError(f"making the encoders in {folder} failed in a child process (exit code {code})")
    began.rename(mark)
    return models


def make_llm_folder(folder: Path, seed: int) -> None:
    """Make, pretrain and save the LLM and its tokenizer."""
    from affectgpt.synthetic import tiny_llm

    with _repeatable(seed):
        tokenizer = tiny_llm.make_tokenizer(seed)
        model = tiny_llm.make_llm(tokenizer)
        tiny_llm.pretrain(model, tokenizer, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_encoder_folders(folder: Path, seed: int) -> None:
    """Make, train and save the two encoders, as `folder/visual` and `folder/audio`."""
    from affectgpt.synthetic import tiny_encoders

    with _repeatable(seed):
        visual, audio = tiny_encoders.tiny_clip(), tiny_encoders.tiny_hubert()
        tiny_encoders.teach_clip(visual, seed)
        tiny_encoders.teach_hubert(audio, seed)
    visual.save_pretrained(folder / "visual")
    audio.requires_grad_(True).save_pretrained(folder / "audio")


class _repeatable:
    """Context with one thread and a seeded torch generator; both are restored afterwards."""

    def __init__(self, seed: int):
        self.seed = seed

    def __enter__(self) -> None:
        self.threads, self.state = torch.get_num_threads(), torch.get_rng_state()
        torch.set_num_threads(1)
        torch.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.threads)
        torch.set_rng_state(self.state)
