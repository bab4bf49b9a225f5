"""`scripts/prepare_data.sh`, as a Slurm array starts it."""

import os
import subprocess
from pathlib import Path

from data.prepare import STAGING
from tests.conftest import write_tiny_recipe

ROOT = Path(__file__).parents[2]


def test_the_tasks_of_an_array_make_one_store_and_its_report(tmp_path):
    recipe = write_tiny_recipe(tmp_path, documents=60, vocab_size=400).model_dump_json()
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")  # JSON is YAML
    store = tmp_path / "store"
    slurm = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_CPUS_PER_TASK": "1"}
    slurm["SLURM_SUBMIT_DIR"] = str(ROOT)
    command = ["bash", str(ROOT / "scripts" / "prepare_data.sh"), str(tmp_path / "recipe.yaml"), str(store)]
    tasks = [
        subprocess.Popen(
            command,
            env=os.environ | slurm | {"SLURM_ARRAY_TASK_ID": task},
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for task in ("4", "5")
    ]
    said = [task.communicate()[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert '"documents": 120' in said[0] and not (store / STAGING).exists()
    page = (tmp_path / "store-report.html").read_text(encoding="utf-8")
    assert "verse" in page and "code" in page
