"""`scripts/prepare_data.sh`, as a Slurm array and as a user elsewhere starts it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from data.prepare import STAGING
from tests.conftest import write_tiny_recipe

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "prepare_data.sh"


@pytest.fixture
def copy(tmp_path):
    """The script as Slurm runs it: alone in a folder of its own."""
    (tmp_path / "spool").mkdir()
    return Path(shutil.copy(SCRIPT, tmp_path / "spool" / "slurm_script"))


def started(script, folder, *arguments, **more):
    return subprocess.Popen(
        ["bash", str(script), *map(str, arguments)],
        env={key: value for key, value in os.environ.items() if not key.startswith("SLURM_")} | more,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_any_tasks_of_an_array_make_one_store_and_its_report(tmp_path, copy):
    """3 by Slurm's copy of the script, 7 by the script itself, with paths from where they are called."""
    recipe = write_tiny_recipe(tmp_path, documents=60, vocab_size=400).model_dump_json()
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")  # JSON is YAML
    store, page = tmp_path / "store", tmp_path / "store-report.html"
    slurm = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "7"}
    slurm |= {"SLURM_CPUS_PER_TASK": "1", "SLURM_SUBMIT_DIR": str(ROOT)}
    tasks = [
        started(copy, tmp_path, "recipe.yaml", "store/", **slurm, SLURM_ARRAY_TASK_ID="3"),
        started(SCRIPT, tmp_path, "recipe.yaml", "store/", **slurm, SLURM_ARRAY_TASK_ID="7"),
    ]
    said = [task.communicate()[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], "\n".join(said)
    assert sorted('"documents": 120' in words for words in said) == [False, True] and not (store / STAGING).exists()
    text = page.read_text(encoding="utf-8")
    assert "verse" in text and "code" in text and "vocab_size: 400" in text

    page.unlink()
    alone = started(SCRIPT, tmp_path, "recipe.yaml", "store")
    assert "already holds the store" in alone.communicate()[0] and page.read_text(encoding="utf-8") == text


def test_a_copy_that_was_not_submitted_from_the_repository_says_so(tmp_path, copy):
    task = started(copy, tmp_path, SLURM_SUBMIT_DIR=str(tmp_path))
    said = task.communicate()[0]
    assert task.returncode == 2
    assert (
        said == f"rorqual: {tmp_path}/scripts/env.sh is missing; submit scripts/prepare_data.sh from the repository\n"
    )
