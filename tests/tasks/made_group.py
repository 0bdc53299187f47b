"""A small group of lm-eval's, `wmdp`, with data of our own below a CAIRN_HUB of its own."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

SIZES: Mapping[str, int] = {"wmdp_bio": 6, "wmdp_chem": 9, "wmdp_cyber": 4}
"""The group's tasks, and the questions that each has here."""


def write_group_data(hub: Path) -> Path:
    """Writes sums with four answers as the group's data set, laid out as on the hub; gives the CAIRN_HUB."""
    folder = hub / "cais" / "wmdp"
    configs = []
    for seed, (task, count) in enumerate(SIZES.items()):
        name = task.replace("_", "-")
        (folder / name).mkdir(parents=True)
        random = np.random.default_rng(seed)
        rows = []
        for first, second, answer in random.integers(0, [50, 50, 4], (count, 3)).tolist():
            choices = [str(first + second + place - answer) for place in range(4)]
            rows.append(json.dumps({"question": f"{first} + {second}?", "choices": choices, "answer": answer}))
        (folder / name / "test.jsonl").write_text("\n".join(rows))
        configs.append(
            f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}/test.jsonl\n",
        )
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    return hub
