"""Model directories: what is written loads again, and what is wrong is named."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from yuan2_model import (
    ModelFilesError,
    Yuan2Config,
    Yuan2ForCausalLM,
    check_model_directory,
    load_model,
    load_weights,
    random_model,
    save_model,
    writing,
)
from yuan2_model.dimensions import tensor_shapes
from yuan2_model.files import read_safetensors_header

from .conftest import make_config

GOLDEN = Path(__file__).parents[2] / "golden" / "yuan2-tiny"
SHARD = 12_000
NORM = "model.layers.1.self_attn.lf_gate.output_layernorm.weight"


def state(model: Yuan2ForCausalLM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def write_bins(model: Yuan2ForCausalLM, directory: Path, shards: int) -> None:
    """The layout of older tools: pickled tensors, with their buffers, sharded with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(model.config.to_json_string())
    tensors = state(model) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    names = list(tensors)
    if shards == 1:
        torch.save(tensors, directory / "pytorch_model.bin")
        return
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        part = {name: tensors[name] for name in names[number::shards]}
        torch.save(part, directory / file)
        weight_map.update(dict.fromkeys(part, file))
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_safetensors(model: Yuan2ForCausalLM, directory: Path) -> None:
    save_model(model, model.config, directory)


def write_sharded(model: Yuan2ForCausalLM, directory: Path) -> None:
    save_model(model, model.config, directory, max_shard_size=SHARD)


LAYOUTS: dict[str, Callable[[Yuan2ForCausalLM, Path], None]] = {
    "safetensors": write_safetensors,
    "sharded safetensors": write_sharded,
    "bin": lambda model, directory: write_bins(model, directory, 1),
    "sharded bin": lambda model, directory: write_bins(model, directory, 3),
}


@pytest.fixture(params=LAYOUTS)
def saved(request: pytest.FixtureRequest, model: Yuan2ForCausalLM, tmp_path: Path) -> Path:
    """A directory of the tiny model, in each layout."""
    LAYOUTS[request.param](model, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(model: Yuan2ForCausalLM, tmp_path: Path) -> Path:
    write_sharded(model, tmp_path / "model")
    return tmp_path / "model"


def message(directory: Path) -> str:
    """The error of loading, which the header check gives as well, in one line."""
    with pytest.raises(ModelFilesError) as caught:
        check_model_directory(directory)
    with pytest.raises(ModelFilesError) as loading:
        load_model(directory)
    assert str(loading.value) == str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.reason == "InvalidModel"
    return str(caught.value)


class TestLoading:
    def test_every_layout_gives_the_same_model(self, model: Yuan2ForCausalLM, saved: Path) -> None:
        loaded = load_model(saved)
        torch.testing.assert_close(state(loaded), state(model), rtol=0, atol=0)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert not loaded.training
        assert all(parameter.requires_grad for parameter in loaded.parameters())

    def test_headers_tell_what_is_there(self, model: Yuan2ForCausalLM, saved: Path) -> None:
        facts = check_model_directory(saved)
        shapes = {name: fact.shape for name, fact in facts.tensors.items()}
        assert shapes == tensor_shapes(model.config.dimensions())
        assert facts.size == sum(t.numel() * 4 for t in model.state_dict().values())
        assert facts.dimensions == model.config.dimensions()

    def test_from_pretrained_and_save_pretrained_are_the_same_thing(
        self, model: Yuan2ForCausalLM, tmp_path: Path
    ) -> None:
        model.save_pretrained(tmp_path / "a")
        loaded = Yuan2ForCausalLM.from_pretrained(tmp_path / "a", torch_dtype=torch.bfloat16)
        assert loaded.dtype == torch.bfloat16
        with pytest.raises(TypeError, match="trust_remote_code"):
            Yuan2ForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=True)
        with pytest.raises(ValueError, match="give one"):
            Yuan2ForCausalLM.from_pretrained(tmp_path / "a", torch_dtype="auto", dtype="auto")

    @pytest.mark.parametrize(
        ("asked", "got"),
        [
            (None, torch.float32),
            ("auto", torch.float32),
            ("bfloat16", torch.bfloat16),
            (torch.float16, torch.float16),
        ],
    )
    def test_types(self, asked: torch.dtype | str | None, got: torch.dtype) -> None:
        assert {p.dtype for p in load_model(GOLDEN, dtype=asked).parameters()} == {got}

    def test_unknown_type_is_refused(self) -> None:
        with pytest.raises(ValueError, match="dtype must be one of"):
            load_model(GOLDEN, dtype="int3")

    def test_type_of_the_files_counts_where_config_names_none(
        self, tmp_path: Path, model: Yuan2ForCausalLM
    ) -> None:
        save_model(model.to(torch.bfloat16), model.config, tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config.pop("torch_dtype") == "bfloat16"
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert load_model(tmp_path).dtype == torch.bfloat16

    def test_weights_of_another_directory_fill_a_model_in_place(
        self, model: Yuan2ForCausalLM, saved: Path
    ) -> None:
        other = random_model(make_config(), seed=5)
        before = [p.data_ptr() for p in other.parameters()]
        load_weights(other, saved)
        torch.testing.assert_close(state(other), state(model), rtol=0, atol=0)
        assert [p.data_ptr() for p in other.parameters()] == before

    def test_loaded_weights_survive_their_files(self, model: Yuan2ForCausalLM, saved: Path) -> None:
        loaded = load_model(saved)
        for file in saved.iterdir():
            file.write_bytes(b"")
        torch.testing.assert_close(state(loaded), state(model), rtol=0, atol=0)

    def test_untied_head_is_its_own(self, tmp_path: Path) -> None:
        untied = random_model(make_config(tie_word_embeddings=False), seed=1)
        save_model(untied, untied.config, tmp_path)
        loaded = load_model(tmp_path)
        torch.testing.assert_close(state(loaded), state(untied), rtol=0, atol=0)
        assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight

    def test_checking_headers_imports_no_torch(self, sharded: Path) -> None:
        program = (
            "import sys; from yuan2_model import check_model_directory; "
            "check_model_directory(sys.argv[1]); sys.exit('torch' in sys.modules)"
        )
        environment = {"PYTHONPATH": str(Path(__file__).parents[3] / "core")}
        assert subprocess.run([sys.executable, "-c", program, sharded], env=environment).returncode == 0


class TestSaving:
    def test_published_layout_with_a_stored_copy_of_the_head(
        self, model: Yuan2ForCausalLM, tmp_path: Path
    ) -> None:
        save_model(model, model.config, tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
        tensors = load_file(tmp_path / "model.safetensors")
        assert tensors.keys() == tensor_shapes(model.config.dimensions()).keys()
        torch.testing.assert_close(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])

    def test_golden_checkpoint_comes_back_as_it_was(self, tmp_path: Path) -> None:
        save_model(load_model(GOLDEN), load_model(GOLDEN).config, tmp_path)
        wanted = load_file(GOLDEN / "model.safetensors")
        wanted = {name: t for name, t in wanted.items() if not name.endswith("rotary_emb.inv_freq")}
        torch.testing.assert_close(load_file(tmp_path / "model.safetensors"), wanted, rtol=0, atol=0)
        written = json.loads((tmp_path / "config.json").read_text())
        wanted_config = json.loads((GOLDEN / "config.json").read_text())
        del wanted_config["auto_map"]  # the files that it names are not written
        assert written == wanted_config

    def test_shards_keep_the_limit_and_the_index_names_them(self, sharded: Path) -> None:
        index = json.loads((sharded / "model.safetensors.index.json").read_text())
        files = sorted(sharded.glob("model-*.safetensors"))
        assert len(files) > 2
        assert set(index["weight_map"].values()) == {file.name for file in files}
        sizes = [sum(t.numel() * 4 for t in load_file(file).values()) for file in files]
        assert sum(sizes) == index["metadata"]["total_size"]
        assert all(
            size <= SHARD or len(load_file(file)) == 1 for size, file in zip(sizes, files, strict=True)
        )

    def test_state_dict_without_the_tied_head_is_complete(
        self, model: Yuan2ForCausalLM, tmp_path: Path
    ) -> None:
        tensors = state(model)
        del tensors["lm_head.weight"]
        save_model(tensors, model.config, tmp_path)
        torch.testing.assert_close(state(load_model(tmp_path)), state(model), rtol=0, atol=0)

    def test_incomplete_state_dict_writes_nothing(self, model: Yuan2ForCausalLM, tmp_path: Path) -> None:
        tensors = state(model)
        del tensors[NORM]
        with pytest.raises(ModelFilesError, match=f"missing tensor {NORM}"):
            save_model(tensors, model.config, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_auto_map_is_written_only_where_its_modelling_files_are(
        self, model: Yuan2ForCausalLM, tmp_path: Path
    ) -> None:
        code = {"AutoConfig": "configuration_yuan.YuanConfig", "AutoTokenizer": ["slow.Tokenizer", None]}
        config = Yuan2Config.from_dict(model.config.published() | {"auto_map": code})
        save_model(model, config, tmp_path)
        (tmp_path / "configuration_yuan.py").touch()
        assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
        save_model(model, config, tmp_path)
        assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "slow.py").touch()
        save_model(model, config, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == code

    def test_saving_over_another_layout_leaves_one_model(self, model: Yuan2ForCausalLM, saved: Path) -> None:
        (saved / "tokenizer.model").write_text("kept")
        other = random_model(make_config(), seed=9)
        save_model(other, other.config, saved)
        assert sorted(p.name for p in saved.iterdir()) == [
            "config.json",
            "model.safetensors",
            "tokenizer.model",
        ]
        torch.testing.assert_close(state(load_model(saved)), state(other), rtol=0, atol=0)

    def test_failed_write_is_an_os_error_and_leaves_the_older_model(
        self, model: Yuan2ForCausalLM, sharded: Path
    ) -> None:
        """A limit on the size of files stands for a full volume: the same system call fails the same way."""
        before = sorted(path.name for path in sharded.iterdir())
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD, hard))
        try:
            with pytest.raises(OSError, match=r"model\.safetensors") as caught:
                save_model(random_model(make_config(), seed=9), model.config, sharded)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.errno == errno.EFBIG
        assert sorted(path.name for path in sharded.iterdir()) == before
        torch.testing.assert_close(state(load_model(sharded)), state(model), rtol=0, atol=0)

    def test_death_while_publishing_leaves_no_model_rather_than_a_mixture(
        self, model: Yuan2ForCausalLM, sharded: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, calls = Path.replace, []

        def dies(self: Path, target: Path) -> Path:
            calls.append(target)
            if sum(found.parent == sharded for found in calls) == 2:
                raise KeyboardInterrupt
            return real(self, target)

        monkeypatch.setattr(Path, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            save_model(random_model(make_config(), seed=9), model.config, sharded, max_shard_size=SHARD)
        assert "config.json: missing" in message(sharded)

    @pytest.mark.parametrize(
        ("size", "limit"), [("5GB", 5 * 10**9), ("1 MiB", 2**20), ("300", 300), (7, 7), ("2kb", 2000)]
    )
    def test_shard_sizes(self, size: int | str, limit: int) -> None:
        assert writing._bytes(size) == limit

    @pytest.mark.parametrize("size", ["", "5 tons", 0, -1, "0MB"])
    def test_impossible_shard_sizes_are_refused(self, size: int | str) -> None:
        with pytest.raises(ValueError, match="max_shard_size"):
            writing._bytes(size)


class TestDamage:
    """Each kind of damage is one line that names the file and the tensor."""

    def rewrite(self, directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    @pytest.fixture
    def single(self, tmp_path: Path) -> Path:
        shutil.copytree(GOLDEN, tmp_path / "model")
        return tmp_path / "model"

    def test_missing_tensor(self, single: Path) -> None:
        self.rewrite(single, lambda t: t.pop(NORM))
        assert message(single) == f"{single}: missing tensor {NORM}; the model is incomplete"

    def test_many_missing_tensors_are_counted(self, single: Path) -> None:
        self.rewrite(single, lambda t: [t.pop(name) for name in list(t) if ".layers.2." in name])
        assert "and 10 more" in message(single)

    def test_unknown_tensor(self, single: Path) -> None:
        self.rewrite(single, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
        assert "unknown tensor model.layers.0.self_attn.q_proj.bias" in message(single)

    def test_wrong_shape(self, single: Path) -> None:
        self.rewrite(single, lambda t: t.update({NORM: torch.zeros(63)}))
        assert message(single) == (
            f"{single}/model.safetensors: tensor {NORM} has shape [63], but config.json asks for [64]"
        )

    def test_integer_weights(self, single: Path) -> None:
        self.rewrite(single, lambda t: t.update({NORM: torch.zeros(64, dtype=torch.int8)}))
        assert f"tensor {NORM} has type I8, expected one of" in message(single)

    def test_tied_head_may_be_absent(self, single: Path) -> None:
        self.rewrite(single, lambda t: t.pop("lm_head.weight"))
        assert "lm_head.weight" not in check_model_directory(single).tensors
        loaded = load_model(single)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight

    def test_untied_head_may_not_be_absent(self, single: Path) -> None:
        self.rewrite(single, lambda t: t.pop("lm_head.weight"))
        config = json.loads((single / "config.json").read_text()) | {"tie_word_embeddings": False}
        (single / "config.json").write_text(json.dumps(config))
        assert "missing tensor lm_head.weight" in message(single)

    def test_tied_head_that_differs_is_refused_when_it_is_read(self, single: Path) -> None:
        self.rewrite(single, lambda t: t["lm_head.weight"].add_(1))
        with pytest.raises(
            ModelFilesError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"
        ):
            load_model(single)

    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_truncated_safetensors(self, single: Path, keep: int) -> None:
        file = single / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        assert message(single).startswith(f"{file}: ")
        assert "truncated" in message(single)

    @pytest.mark.parametrize("keep", [0, 50, -30])
    def test_truncated_bin(self, model: Yuan2ForCausalLM, tmp_path: Path, keep: int) -> None:
        write_bins(model, tmp_path, 1)
        file = tmp_path / "pytorch_model.bin"
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(ModelFilesError) as caught:
            load_model(tmp_path)
        assert str(caught.value).startswith(f"{file}: truncated")

    def test_bin_that_would_run_code(self, model: Yuan2ForCausalLM, tmp_path: Path) -> None:
        write_bins(model, tmp_path, 1)
        torch.save({"x": print}, tmp_path / "pytorch_model.bin")
        assert "not a file of plain tensors" in message(tmp_path)

    def test_bin_that_holds_something_else(self, model: Yuan2ForCausalLM, tmp_path: Path) -> None:
        write_bins(model, tmp_path, 1)
        torch.save({"state": {"x": torch.ones(1)}}, tmp_path / "pytorch_model.bin")
        assert "must hold a mapping of names to tensors" in message(tmp_path)

    def test_missing_shard(self, sharded: Path) -> None:
        shard = sorted(sharded.glob("model-*.safetensors"))[1]
        shard.unlink()
        assert message(sharded) == (
            f"{shard}: missing, though model.safetensors.index.json names it; copy the whole model"
        )

    def test_shard_without_a_tensor_of_the_index(self, sharded: Path) -> None:
        shard = sorted(sharded.glob("model-*.safetensors"))[1]
        tensors = load_file(shard)
        gone = sorted(tensors)[0]
        del tensors[gone]
        save_file(tensors, shard)
        assert message(sharded) == f"{shard}: tensor {gone} is missing, though the index places it there"

    @pytest.mark.parametrize(
        "content", ["{", "[]", "{}", '{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": 1}}']
    )
    def test_broken_index(self, sharded: Path, content: str) -> None:
        (sharded / "model.safetensors.index.json").write_text(content)
        assert message(sharded).startswith(f"{sharded}/model.safetensors.index.json: ")

    @pytest.mark.parametrize("content", ["", "{", "[1]", '"x"'])
    def test_broken_config(self, single: Path, content: str) -> None:
        (single / "config.json").write_text(content)
        assert message(single).startswith(f"{single}/config.json: ")

    def test_a_file_that_may_not_be_opened(self, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        weights = single / "model.safetensors"

        def refuse(path: Path, *_: object) -> None:  # root, who may run this test, is refused nothing
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", refuse)
            with pytest.raises(ModelFilesError) as caught:
                read_safetensors_header(weights)
        assert str(caught.value) == f"{weights}: cannot be read (Permission denied); let this user read it"

    def test_others_may_read_what_was_written(self, single: Path) -> None:
        assert (single / "model.safetensors").stat().st_mode & 0o777 == 0o644

    def test_no_directory(self, tmp_path: Path) -> None:
        assert message(tmp_path / "absent") == f"{tmp_path}/absent: no such model directory"

    def test_no_weights(self, single: Path) -> None:
        (single / "model.safetensors").unlink()
        assert "no weights; expected model.safetensors or pytorch_model.bin" in message(single)


class TestRandomModel:
    def test_same_seed_same_weights_and_the_callers_generator_is_left_alone(
        self, config: Yuan2Config
    ) -> None:
        torch.manual_seed(3)
        before = torch.random.get_rng_state()
        models = [state(random_model(config, seed=seed)) for seed in (4, 4, 5)]
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.testing.assert_close(models[0], models[1], rtol=0, atol=0)
        assert not torch.equal(models[0]["lm_head.weight"], models[2]["lm_head.weight"])

    def test_weights_are_normal_and_norms_are_one(self) -> None:
        model = random_model(
            make_config(hidden_size=128, intermediate_size=512, initializer_range=0.02), seed=0
        )
        layer = model.model.layers[0]
        for weight in (layer.mlp.down_proj.weight, layer.self_attn.lf_gate.conv1.weight):
            assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert bool((model.model.norm.weight == 1).all())
        assert not layer.self_attn.lf_gate.conv2.bias.any()
