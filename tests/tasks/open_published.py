"""Opens published folders where Cairn is not to be had: `python -I open_published.py FOLDER`.

Every folder `FOLDER/*/published` is opened by `transformers`, fed with `inputs.npz` beside it, and what comes out is
written to `outputs.npz` there. Nothing of Cairn may be imported here, whatever is installed.
"""

import contextlib
import importlib.util
import io
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

CAIRN = ("common", "artifacts", "models", "tasks", "flows")


class NoCairn(MetaPathFinder):
    """Refuses Cairn's packages, which an editable installation would find."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in CAIRN:
            raise ImportError(f"{fullname} is of Cairn")
        return None


sys.meta_path.insert(0, NoCairn())

import numpy as np  # noqa: E402  # after the refusal, so that it holds for them too
import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

PAD = 0


def opened(folder: Path, **options: Any) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    assert not model.training
    return model


def padded(rows: list[list[int]], left: bool) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), PAD), torch.zeros((len(rows), longest), dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def continued(model: Any, new: int, inputs: dict[str, torch.Tensor], **options: Any) -> np.ndarray:
    ids = model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)
    found: np.ndarray = ids[:, inputs["input_ids"].shape[1] :].numpy()
    return found


def forward(folder: Path, ids: torch.Tensor, rows: list[list[int]], new: int) -> dict[str, Any]:
    model = opened(folder, dtype=torch.float32)
    assert model.config._attn_implementation == "sdpa"
    whole = model(ids, labels=ids, output_hidden_states=True)
    assert torch.equal(whole.hidden_states[-1], model.model(ids)[0])
    assert len(whole.hidden_states) == model.config.num_hidden_layers + 1
    halves = model(ids[:, :3], use_cache=True)
    second = model(ids[:, 3:], past_key_values=halves.past_key_values)
    left, right = padded(rows, left=True), padded(rows, left=False)
    return {
        "logits": whole.logits,
        "loss": whole.loss,
        "in_two": torch.cat((halves.logits, second.logits), dim=1),
        "last": model(ids, logits_to_keep=2).logits,
        "tuple": model(ids, return_dict=False)[0],
        "eager": opened(folder, dtype=torch.float32, attn_implementation="eager")(ids).logits,
        "embedded": model(inputs_embeds=model.get_input_embeddings()(ids)).logits,
        "left": model(**left).logits,
        "right": model(**right).logits,
        "left_eager": opened(folder, dtype=torch.float32, attn_implementation="eager")(**left).logits,
        "generated": continued(model, new, left),
        "generated_again": continued(model, new, left, use_cache=False),
        "generated_static": continued(model, new, left, cache_implementation="static"),
        "generated_half": opened(folder, dtype=torch.bfloat16).generate(**left, max_new_tokens=2),
    }


def saved_again(folder: Path, ids: torch.Tensor) -> dict[str, Any]:
    """What a copy of the folder that `save_pretrained` wrote gives."""
    again = folder.parent / "saved"
    opened(folder).save_pretrained(again)
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(again)
    assert type(AutoConfig.from_pretrained(again, trust_remote_code=True)).__name__ == "CairnConfig"
    return {"saved_logits": opened(again)(ids).logits}


def by_the_card(folder: Path) -> list[int]:
    """The tokens of what the code on the model card prints."""
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    printed, names = io.StringIO(), dict[str, Any]()
    with contextlib.redirect_stdout(printed):
        exec(code.replace('"path/to/this/folder"', repr(str(folder))), names)
    found: list[int] = names["tokenizer"].encode(printed.getvalue().removesuffix("\n"), add_special_tokens=False)
    return found


def scored(folder: Path) -> list[float]:
    """Log-likelihoods by the evaluation harness, after a context and after none; nothing where it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        return []
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", dtype="float32", batch_size=2)
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate([("12+3", "4=46"), ("", "7=7")])]
    return [score for score, _ in harness.loglikelihood(asked)]


def main(root: Path) -> None:
    places = sorted(root.iterdir())
    for place in places:
        folder, given = place / "published", np.load(place / "inputs.npz")
        ids = torch.from_numpy(given["ids"].astype(np.int64))
        rows = [row[:length].tolist() for row, length in zip(given["ids"], given["lengths"], strict=True)]
        with torch.no_grad():
            found = forward(folder, ids, rows, int(given["new"])) | saved_again(folder, ids)
            half = opened(folder, dtype=torch.bfloat16)
            assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
            found |= {"half": half(ids).logits.float(), "parameters": half.num_parameters()}
        found["card"] = by_the_card(folder)
        found["scored"] = scored(folder) if place == places[-1] else []
        # A step of training, with dropout where the config has some.
        model = opened(folder).train()
        model(ids, labels=ids).loss.backward()
        found["without_gradient"] = sum(parameter.grad is None for parameter in model.parameters())
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in found.items()}
        np.savez(place / "outputs.npz", **arrays)
    assert not [name for name in sys.modules if name.partition(".")[0] in CAIRN]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
