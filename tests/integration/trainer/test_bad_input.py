"""Input that cannot work ends a pod with exit code 78 and a sentence, before any rank trains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.training import make_job, run_pod
from yuan2_core.tokenizer import train_tokenizer

Spoil = Callable[[Path, Path], None]


def bad_record(_: Path, data: Path) -> None:
    records = json.loads(data.read_text())
    records[6]["conversations"][1]["value"] = ""
    data.write_text(json.dumps(records))


def truncated_data(_: Path, data: Path) -> None:
    data.write_text(data.read_text()[:-40])


def empty_data(_: Path, data: Path) -> None:
    data.write_text("[]")


def missing_tensor(model: Path, _: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")


def truncated_weights(model: Path, _: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def foreign_tokenizer(model: Path, _: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text of another project"] * 5),
        model_prefix=str(model / "tokenizer"),
        model_type="bpe",
        byte_fallback=True,
        vocab_size=300,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<eod>", "<pad>"],
        minloglevel=2,
    )
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        (model / name).unlink(missing_ok=True)


def larger_tokenizer(model: Path, _: Path) -> None:
    characters = "".join(chr(0x4E00 + number) for number in range(600))
    tokenizer = train_tokenizer([characters], 1000, model / "tokenizer.model")
    tokenizer.save_pretrained(model)


CASES: list[tuple[Spoil, str, list[str]]] = [
    (bad_record, "InvalidData", ["data.json, record 7 (id r6), conversations[1]", "empty"]),
    (truncated_data, "InvalidData", ["data.json"]),
    (empty_data, "InvalidData", ["data.json"]),
    (missing_tensor, "InvalidModel", ["model", "model.layers.1.mlp.up_proj.weight"]),
    (truncated_weights, "InvalidModel", ["model.safetensors"]),
    (foreign_tokenizer, "InvalidModel", ["tokenizer.model", "<sep>"]),
    (larger_tokenizer, "InvalidModel", ["vocab_size"]),
]


@pytest.mark.parametrize(("spoil", "reason", "texts"), CASES, ids=[case[0].__name__ for case in CASES])
def test_bad_input_is_named_and_final(
    inputs: tuple[Path, Path], tmp_path: Path, spoil: Spoil, reason: str, texts: list[str]
) -> None:
    model = Path(shutil.copytree(inputs[0], tmp_path / "model"))
    data = Path(shutil.copy(inputs[1], tmp_path / "data.json"))
    spoil(model, data)
    code, pod = run_pod(make_job(model, data, tmp_path / "output"), tmp_path / "pod")
    assert code == 78, pod.output
    assert pod.termination["reason"] == reason
    for text in texts:
        assert text in pod.termination["message"]
    assert not (tmp_path / "output" / "checkpoints").exists()


def test_a_model_of_another_size_is_refused(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    job = make_job(*inputs, tmp_path / "output")
    job = job.model_copy(update={"model": job.model.model_copy(update={"size": "2B"})})
    code, pod = run_pod(job, tmp_path / "pod")
    assert code == 78
    assert "hidden_size 32, but Yuan 2.0 2B has 2048" in pod.termination["message"]


def test_an_output_that_is_no_directory_is_refused(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "output").write_text("a file")
    code, pod = run_pod(make_job(*inputs, tmp_path / "output"), tmp_path / "pod")
    assert code == 78
    assert pod.termination["reason"] == "InvalidJob"
    assert "output" in pod.termination["message"]


def test_a_job_of_an_unknown_field_is_refused(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    job = json.loads(make_job(*inputs, tmp_path / "output").to_json())
    job["training"]["learningRat"] = 1

    class Document:
        def to_json(self) -> str:
            return json.dumps(job)

    code, pod = run_pod(Document(), tmp_path / "pod")
    assert code == 78
    assert pod.termination["reason"] == "InvalidJob"
    assert "training.learningRat" in pod.termination["message"]
