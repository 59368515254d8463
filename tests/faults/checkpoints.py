"""Model directories that are damaged, contradictory, or not what they seem."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.faults.judge import Case
from tests.faults.values import NASTY, damage, edit_json, replace

INDEX = "model.safetensors.index.json"
CONFIG_KEYS = (
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "hidden_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "decoder_sparse_step",
    "mlp_only_layers",
    "norm_topk_prob",
    "hidden_act",
    "model_type",
    "architectures",
    "dtype",
    "torch_dtype",
    "rope_theta",
    "rope_parameters",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
    "sliding_window",
    "layer_types",
    "quantization_config",
    "auto_map",
)


def cases(bases: Sequence[Path], count: int, rng: random.Random) -> list[Case]:
    """Of directories that hold a sound job, whose model is in `model`."""
    anything: list[Callable[[Path, random.Random], list[str]]] = [
        _config_value,
        _config_value,
        _config_edit,
        _index_edit,
        _header_edit,
        _header_edit,
        _damaged,
        _replaced,
    ]
    refused = [
        _cut_shard,
        _long_header,
        _outside,
        _not_finite,
        _missing_expert,
        _extra_expert,
        _shape,
        _nothing,
        _quantised,
        _twice,
        _less_experts,
    ]
    made = []
    for number in range(count):
        base = rng.choice(bases)
        if number % 3 == 0:
            made.append(Case("checkpoint", "refused", base, rng.choice(refused), refused=True))
        else:
            made.append(Case("checkpoint", "damaged", base, rng.choice(anything)))
    return made


def _command(rng: random.Random) -> list[str]:
    return rng.choice((["prune", "--recipe", "recipe.yaml", "--dry-run"], ["inspect", "model"]))


_PRUNE = ["prune", "--recipe", "recipe.yaml"]


def _shard(place: Path, rng: random.Random) -> Path:
    return rng.choice(sorted((place / "model").glob("*.safetensors")))


def _config(place: Path, **values: Any) -> None:
    path = place / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _config_value(place: Path, rng: random.Random) -> list[str]:
    _config(place, **{rng.choice(CONFIG_KEYS): rng.choice(NASTY)})
    return _command(rng)


def _config_edit(place: Path, rng: random.Random) -> list[str]:
    edit_json(place / "model" / "config.json", rng)
    return _command(rng)


def _index_edit(place: Path, rng: random.Random) -> list[str]:
    edit_json(place / "model" / INDEX, rng)
    return _command(rng)


def _damaged(place: Path, rng: random.Random) -> list[str]:
    names = ["config.json", INDEX, "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    paths = [place / "model" / name for name in names]
    damage(rng.choice([path for path in paths if path.exists()] + [_shard(place, rng)] * 3), rng)
    return _command(rng)


def _replaced(place: Path, rng: random.Random) -> list[str]:
    replace(rng.choice(sorted((place / "model").glob("*.*"))), rng)
    return _command(rng)


def _header_edit(place: Path, rng: random.Random) -> list[str]:
    path = _shard(place, rng)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry, (begin, end) = header[name], header[name]["data_offsets"]
    change = rng.randrange(7)
    if change == 0:
        entry["data_offsets"] = rng.choice(
            ([end, begin], [begin - 1, end], [begin, end + 8], [0, 2**63], [begin], "x")
        )
    elif change == 1:
        entry["dtype"] = rng.choice(("F64", "I8", "F8_E4M3", "BF17", "", None, 3))
    elif change == 2:
        entry["shape"] = rng.choice(([], [-1], [0], [2**40, 2**40], [1.5], entry["shape"][::-1], "x", None))
    elif change == 3:
        del header[name]
    elif change == 4:
        header[name + "x"] = entry
    elif change == 5:
        header[name] = rng.choice(NASTY)
    else:
        header["__metadata__"] = rng.choice(({}, [], "x", {"a": 1}))
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])
    return _command(rng)


def _cut_shard(place: Path, rng: random.Random) -> list[str]:
    path = _shard(place, rng)
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])
    return _command(rng)


def _long_header(place: Path, rng: random.Random) -> list[str]:
    path = _shard(place, rng)
    length = rng.choice((0, 1, 10**6, 10**8, 2**32, 2**62, 2**64 - 1))
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    return _command(rng)


def _outside(place: Path, rng: random.Random) -> list[str]:
    path = place / "model" / INDEX
    index = json.loads(path.read_text())
    name = rng.choice(list(index["weight_map"]))
    other = place / "other.safetensors"
    if rng.random() < 0.5:
        index["weight_map"][name] = rng.choice(
            (
                "../other.safetensors",
                str(other),
                "/etc/passwd",
                "..",
                ".",
                "",
                "a/b",
                "a\\b",
                "model-1\u0000",
                "~/x",
            )
        )
        path.write_text(json.dumps(index))
    else:
        shard = place / "model" / index["weight_map"][name]
        shard.rename(other)
        shard.symlink_to(rng.choice(("../other.safetensors", str(other))))
    return _command(rng)


def _with_tensors(
    place: Path, rng: random.Random, change: Callable[[dict[str, torch.Tensor], str], None]
) -> None:
    """Change a shard that holds experts; its index is not touched."""
    shards = sorted((place / "model").glob("*.safetensors"))
    rng.shuffle(shards)
    for path in shards:
        tensors = load_file(path)
        experts = [name for name in tensors if ".experts." in name]
        if experts:
            change(tensors, rng.choice(experts))
            save_file(tensors, path, {"format": "pt"})
            return


def _not_finite(place: Path, rng: random.Random) -> list[str]:
    """In an expert, or in any other tensor."""

    def change(tensors: dict[str, torch.Tensor], name: str) -> None:
        value = rng.choice((float("nan"), float("inf"), -float("inf")))
        if rng.random() < 0.3:
            name = rng.choice(sorted(tensors))
        tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = value

    _with_tensors(place, rng, change)
    return _PRUNE


def _missing_expert(place: Path, rng: random.Random) -> list[str]:
    """Also from the index, so that only the configuration tells."""

    def change(tensors: dict[str, torch.Tensor], name: str) -> None:
        del tensors[name]
        path = place / "model" / INDEX
        index = json.loads(path.read_text())
        del index["weight_map"][name]
        path.write_text(json.dumps(index))

    _with_tensors(place, rng, change)
    return _command(rng)


def _extra_expert(place: Path, rng: random.Random) -> list[str]:
    def change(tensors: dict[str, torch.Tensor], name: str) -> None:
        head, _, tail = name.partition(".experts.")
        number, _, rest = tail.partition(".")
        other = f"{head}.experts.{int(number) + rng.choice((100, 10**12))}.{rest}"
        tensors[other] = tensors[name].clone()
        path = place / "model" / INDEX
        index = json.loads(path.read_text())
        index["weight_map"][other] = index["weight_map"][name]
        path.write_text(json.dumps(index))

    _with_tensors(place, rng, change)
    return _command(rng)


def _shape(place: Path, rng: random.Random) -> list[str]:
    def change(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors[name] = rng.choice(
            (tensors[name].T, tensors[name][:-1], tensors[name].flatten())
        ).contiguous()
        if tensors[name].shape[0] == tensors[name].shape[-1]:
            tensors[name] = tensors[name][1:].contiguous()

    _with_tensors(place, rng, change)
    return _command(rng)


def _nothing(place: Path, rng: random.Random) -> list[str]:
    for path in (place / "model").glob(rng.choice(("*.safetensors", "*.json", "config.json"))):
        path.unlink()
    return _command(rng)


def _quantised(place: Path, rng: random.Random) -> list[str]:
    _config(
        place,
        quantization_config=rng.choice(
            ({"quant_method": "moe_rco"}, {"quant_method": "gptq", "bits": 4}, [1], "x")
        ),
    )
    return ["prune", "--recipe", "recipe.yaml", "--dry-run"]


def _twice(place: Path, rng: random.Random) -> list[str]:
    """A tensor in two files."""
    first, second = rng.sample(sorted((place / "model").glob("*.safetensors")), 2)
    tensors, others = load_file(first), load_file(second)
    name = rng.choice(list(others))
    save_file({**tensors, name: others[name]}, first, {"format": "pt"})
    return _command(rng)


def _less_experts(place: Path, rng: random.Random) -> list[str]:
    """The configuration knows other experts than the files."""
    count = rng.choice((0, 1, 3, 7, 9, 64, 10**5))
    _config(place, num_experts=count, num_local_experts=count)
    return _command(rng)
