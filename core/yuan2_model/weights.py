"""Model directories in the published layout: loading and saving, whole or tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from yuan2_model.bins import read_bin
from yuan2_model.config import Yuan2Config
from yuan2_model.dimensions import EMBEDDING, HEAD
from yuan2_model.errors import ModelFilesError
from yuan2_model.files import CONFIG_FILE, ModelFacts, check_model_directory
from yuan2_model.model import Yuan2ForCausalLM
from yuan2_model.writing import DTYPES, save_model

__all__ = ["load_config", "load_model", "load_weights", "random_model", "read_tensors", "save_model"]

_CONFIG_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_config(facts: ModelFacts) -> Yuan2Config:
    """The configuration of a checked directory."""
    config: Yuan2Config = Yuan2Config.from_dict(dict(facts.config))
    return config


def load_model(
    directory: str | PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> Yuan2ForCausalLM:
    """Load a model directory; nothing is fetched and no code of the directory is run.

    Args:
        directory: config.json with safetensors or `pytorch_model*.bin`, single or sharded with an index.
        dtype: type of the weights; None or "auto": what config.json says, else what the files hold.
        device: where the weights go.

    Returns:
        The model in evaluation mode.

    Raises:
        ModelFilesError: one line that names file, field or tensor; also when `lm_head.weight` differs from
            the embedding although `tie_word_embeddings` is true, since one of the two would silently be lost.
    """
    facts = check_model_directory(directory)
    model = empty_model(facts, _chosen_dtype(dtype, facts))
    load_weights(model, facts, device)
    model.eval()
    return model


def empty_model(facts: ModelFacts, dtype: torch.dtype) -> Yuan2ForCausalLM:
    """The model of a directory in a type, without memory for its weights: they are on the meta device."""
    config = load_config(facts)
    with torch.device("meta"):
        model = Yuan2ForCausalLM(config)
    model.to(dtype)
    _remember_dtype(config, dtype)
    return model


def load_weights(
    model: Yuan2ForCausalLM, source: ModelFacts | str | PathLike[str], device: torch.device | str = "cpu"
) -> None:
    """Fill a model with a directory's weights, tensor by tensor, in the types of the model's own parameters.

    Parameters on the meta device get memory on `device`; others are overwritten where they are.

    Raises:
        ModelFilesError: as `load_model`.
    """
    facts = source if isinstance(source, ModelFacts) else check_model_directory(source)
    tied = facts.dimensions.tie_word_embeddings
    place_weights(model, (item for item in read_tensors(facts) if not (tied and item[0] == HEAD)), device)


def place_weights(
    model: Yuan2ForCausalLM, tensors: Iterable[tuple[str, Tensor]], device: torch.device | str
) -> None:
    """`load_weights` from tensors by their published names, without a tied `lm_head.weight`."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors:
        _fill(model, name, parameters[name], tensor, torch.device(device))
    model.tie_weights()


def tensor_order(facts: ModelFacts) -> list[str]:
    """The names of `read_tensors` in its order."""
    return [name for shard in facts.shards for name in _names_in(facts, shard)]


def read_tensors(facts: ModelFacts) -> Iterator[tuple[str, Tensor]]:
    """The published tensors of a directory, one at a time, on the CPU and in the type of the file.

    Copy what is kept: a tensor may be mapped from its file. A tied `lm_head.weight` is compared with the
    embedding and then yielded like any other.

    Raises:
        ModelFilesError: a file is damaged, or the tied `lm_head.weight` differs from the embedding.
    """
    tied = facts.dimensions.tie_word_embeddings and HEAD in facts.tensors
    for shard in facts.shards:
        for name, tensor in _read_shard(facts.directory / shard, _names_in(facts, shard)):
            if tied and name == HEAD and not torch.equal(tensor, _read_one(facts, EMBEDDING)):
                raise ModelFilesError(
                    f"{facts.directory / shard}: {HEAD} differs from {EMBEDDING} although {CONFIG_FILE} "
                    f"ties them; set tie_word_embeddings to false or remove {HEAD}"
                )
            yield name, tensor


def random_model(config: Yuan2Config, seed: int, dtype: torch.dtype = torch.float32) -> Yuan2ForCausalLM:
    """A model of normal(0, `initializer_range`) weights, the same for a seed; leaves global generators alone.

    Returns:
        The model in evaluation mode, on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Yuan2ForCausalLM(config)
    _remember_dtype(config, dtype)
    return model.to(dtype).eval()


def _names_in(facts: ModelFacts, shard: str) -> list[str]:
    return [name for name, fact in facts.tensors.items() if fact.file == shard]


def _read_shard(path: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    if path.suffix != ".safetensors":
        tensors = read_bin(path)
        yield from ((name, tensors[name]) for name in names)
        return
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in names:
                yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ModelFilesError(f"{path}: cannot be read ({error}); copy it again") from None


def _read_one(facts: ModelFacts, name: str) -> Tensor:
    return next(_read_shard(facts.directory / facts.tensors[name].file, [name]))[1]


def _fill(model: nn.Module, name: str, parameter: Tensor, tensor: Tensor, device: torch.device) -> None:
    if not parameter.is_meta:
        parameter.data.copy_(tensor)
        return
    owner, _, attribute = name.rpartition(".")
    # Always a copy: a mapped tensor would change, or crash the process, with its file.
    filled = torch.empty(tensor.shape, dtype=parameter.dtype, device=device).copy_(tensor)
    setattr(
        model.get_submodule(owner), attribute, nn.Parameter(filled, requires_grad=parameter.requires_grad)
    )


def _chosen_dtype(asked: torch.dtype | str | None, facts: ModelFacts) -> torch.dtype:
    """The asked type; else config.json's; else that of the embedding in the file."""
    if isinstance(asked, torch.dtype):
        return asked
    if asked not in (None, "auto"):
        if asked not in _CONFIG_DTYPES:
            raise ValueError(f"dtype must be one of {[*_CONFIG_DTYPES]} or 'auto', found {asked!r}")
        return _CONFIG_DTYPES[asked]
    named = facts.config.get("torch_dtype", facts.config.get("dtype"))
    if named in _CONFIG_DTYPES:
        return _CONFIG_DTYPES[str(named)]
    return DTYPES[facts.tensors[EMBEDDING].dtype]


def _remember_dtype(config: Any, dtype: torch.dtype) -> None:
    """Under the name that this version of transformers gives it."""
    setattr(config, "dtype" if "dtype" in vars(config) else "torch_dtype", dtype)
