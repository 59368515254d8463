"""Model directories: what is read from good ones, and the one-line error for every bad one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_rco.adapters import get_adapter
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.errors import ModelError
from tests.tiny_models import FAMILIES, save_tiny

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3_moe", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def shard_of(model: Path, name: str) -> Path:
    return model / json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][name]


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_shard(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def opened(model: Path, *, experts: bool = False) -> Checkpoint:
    checkpoint = Checkpoint(model)
    if experts:
        checkpoint.check_experts(get_adapter(checkpoint.config))
    return checkpoint


def error_of(model: Path, *, experts: bool = False) -> str:
    with pytest.raises(ModelError) as caught:
        opened(model, experts=experts)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_model_is_read(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "m")
    checkpoint = Checkpoint(model)
    assert len(checkpoint.files) > 2
    adapter = get_adapter(checkpoint.config)
    checkpoint.check_experts(adapter)
    checkpoint.check_finite(adapter.groups(checkpoint.config))
    for file in checkpoint.files:
        for name, tensor in load_file(file).items():
            assert torch.equal(checkpoint.read(name), tensor)
            assert checkpoint.tensors[name].nbytes == tensor.nbytes


def test_a_single_file_is_read(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_tiny("mixtral", tmp_path / "m", max_shard_size="1GB"))
    assert [file.name for file in checkpoint.files] == ["model.safetensors"]
    checkpoint.check_experts(get_adapter(checkpoint.config))


def test_dense_layers_have_no_experts(tmp_path: Path) -> None:
    overrides = {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]}
    checkpoint = Checkpoint(save_tiny("qwen2_moe", tmp_path / "m", **overrides))
    adapter = get_adapter(checkpoint.config)
    assert adapter.moe_layers(checkpoint.config) == [3]
    checkpoint.check_experts(adapter)


def test_reading_an_unknown_tensor_is_an_error(model: Path) -> None:
    with pytest.raises(ModelError, match="no tensor nonsense"):
        Checkpoint(model).read("nonsense")


def test_the_digest_sees_every_byte(model: Path) -> None:
    before = Checkpoint(model).digest()
    assert Checkpoint(model).digest() == before
    shard = shard_of(model, EXPERT)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    weights_changed = Checkpoint(model).digest()
    edit_json(model / "config.json", lambda config: config.update(rope_theta=5))
    assert len({before, weights_changed, Checkpoint(model).digest()}) == 3


def test_companions(model: Path) -> None:
    wanted = ["added_tokens.json", "chat_template.jinja", "merges.txt", "spiece.model", "tokenizer.json",
              "tokenizer_config.json", "vocab.json"]  # fmt: skip
    for name in (*wanted, "README.md", "LICENSE", "pytorch_model.bin", ".hidden", "training_args.json"):
        (model / name).write_text("x")
    (model / "tokenizer_dir").mkdir()
    names = [path.name for path in Checkpoint(model).companions()]
    assert names == sorted([*wanted, "generation_config.json"])


def test_no_directory(tmp_path: Path) -> None:
    assert "no model directory" in error_of(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    assert "no model directory" in error_of(tmp_path / "file")


def test_no_config(model: Path) -> None:
    (model / "config.json").unlink()
    assert "no config.json" in error_of(model)


@pytest.mark.parametrize("text", ["{", "\x00", "[1]", "", "[" * 100_000])
def test_config_is_not_an_object(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    assert "config.json is not" in error_of(model)


def test_config_is_not_utf8(model: Path) -> None:
    (model / "config.json").write_bytes(b"\xff\xfe{}")
    assert "config.json is not JSON" in error_of(model)


def test_no_weights(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()
    (model / "pytorch_model.bin").write_text("x")
    assert "only safetensors models can be read" in error_of(model)


def test_already_quantised(model: Path) -> None:
    edit_json(
        model / "config.json", lambda config: config.update(quantization_config={"quant_method": "gptq"})
    )
    assert "already quantised" in error_of(model)
    assert Checkpoint(model, allow_quantized=True).tensors


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": []}', "x"]
)
def test_damaged_index(model: Path, content: str) -> None:
    (model / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in error_of(model)


def test_missing_shard(model: Path) -> None:
    shard = shard_of(model, EXPERT)
    shard.unlink()
    assert f"names {shard}, which does not exist" in error_of(model)


@pytest.mark.parametrize("name", ["../{}", "/tmp/{}", "sub/{}", "..", "", "sub\\{}", "./{}", "a\0b"])
def test_index_leads_outside(model: Path, name: str) -> None:
    shard = shard_of(model, EXPERT)
    (model / "sub").mkdir()
    shutil.copy(shard, model.parent / shard.name)
    shutil.copy(shard, model / "sub" / shard.name)
    edit_json(
        model / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({EXPERT: name.format(shard.name)}),
    )
    assert "not in the model directory" in error_of(model)


@pytest.mark.parametrize("what", ["config.json", "shard", "tokenizer.json"])
def test_links_out_of_the_directory_are_refused(model: Path, what: str) -> None:
    (model / "tokenizer.json").write_text("{}")
    path = shard_of(model, EXPERT) if what == "shard" else model / what
    shutil.move(path, model.parent / "elsewhere")
    path.symlink_to(model.parent / "elsewhere")
    with pytest.raises(ModelError, match="outside the model directory"):
        Checkpoint(model).companions()


def test_the_hub_cache_is_read(tiny: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(tiny.iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert Checkpoint(snapshot).digest() == Checkpoint(tiny).digest()
    # A link to the whole directory, as people make them, is no link out of it.
    (tmp_path / "link").symlink_to(snapshot)
    assert Checkpoint(tmp_path / "link").companions()


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_shard(model: Path, keep: int) -> None:
    shard = shard_of(model, EXPERT)
    shard.write_bytes(shard.read_bytes()[:keep])
    message = error_of(model)
    assert str(shard) in message
    assert "truncated" in message


def test_damaged_header(model: Path) -> None:
    shard = shard_of(model, EXPERT)
    shard.write_bytes((1 << 60).to_bytes(8, "little") + shard.read_bytes()[8:])
    message = error_of(model)
    assert str(shard) in message
    assert "header is damaged" in message


def test_shard_lacks_a_tensor_of_the_index(model: Path) -> None:
    edit_shard(shard_of(model, EXPERT), lambda tensors: tensors.pop(EXPERT))
    assert f"places tensor {EXPERT} in" in error_of(model)


def test_shard_has_a_tensor_not_in_the_index(model: Path) -> None:
    edit_shard(shard_of(model, EXPERT), lambda tensors: tensors.update(stray=torch.zeros(1)))
    assert "holds tensor stray, which" in error_of(model)


def test_a_tensor_in_two_shards(model: Path) -> None:
    other = "model.embed_tokens.weight"
    assert shard_of(model, other) != shard_of(model, EXPERT)
    edit_shard(shard_of(model, other), lambda tensors: tensors.update({EXPERT: torch.zeros(1)}))
    assert f"holds tensor {EXPERT}, which" in error_of(model)


def drop(model: Path, name: str) -> None:
    edit_shard(shard_of(model, name), lambda tensors: tensors.pop(name))
    edit_json(model / "model.safetensors.index.json", lambda index: index["weight_map"].pop(name))


def add(model: Path, name: str, tensor: torch.Tensor) -> None:
    shard = shard_of(model, EXPERT)
    edit_shard(shard, lambda tensors: tensors.update({name: tensor}))
    edit_json(
        model / "model.safetensors.index.json", lambda index: index["weight_map"].update({name: shard.name})
    )


@pytest.mark.parametrize("name", [EXPERT, "model.layers.0.mlp.gate.weight"])
def test_missing_tensor(model: Path, name: str) -> None:
    drop(model, name)
    assert f"has no tensor {name}" in error_of(model, experts=True)


@pytest.mark.parametrize("name", [EXPERT, "model.layers.0.mlp.gate.weight"])
def test_wrong_shape(model: Path, name: str) -> None:
    edit_shard(shard_of(model, name), lambda tensors: tensors.update({name: torch.zeros(3, 4)}))
    message = error_of(model, experts=True)
    assert f"tensor {name}" in message
    assert "has shape [3, 4]" in message


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.mlp.experts.8.up_proj.weight", "model.layers.0.mlp.experts.1.up_proj.weight_scale"],
)
def test_extra_expert_tensor(model: Path, name: str) -> None:
    add(model, name, torch.zeros(2))
    assert f"holds expert tensor {name}" in error_of(model, experts=True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_unsupported_expert_dtype(model: Path, dtype: torch.dtype) -> None:
    edit_shard(shard_of(model, EXPERT), lambda tensors: tensors.update({EXPERT: tensors[EXPERT].to(dtype)}))
    message = error_of(model, experts=True)
    assert EXPERT in message
    assert "bfloat16, float16 or float32" in message


def test_fused_experts_are_explained(model: Path) -> None:
    for name in list(Checkpoint(model).tensors):
        if ".experts." in name:
            drop(model, name) if name != EXPERT else None
    add(model, "model.layers.0.mlp.experts.gate_up_proj", torch.zeros(8, 128, 64))
    drop(model, EXPERT)
    assert "stores its experts fused" in error_of(model, experts=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_experts_are_named(model: Path, value: float) -> None:
    edit_shard(shard_of(model, EXPERT), lambda tensors: tensors[EXPERT].view(-1)[77].fill_(value))
    checkpoint = Checkpoint(model)
    with pytest.raises(ModelError, match=EXPERT.replace(".", r"\.")):
        checkpoint.check_finite(get_adapter(checkpoint.config).groups(checkpoint.config))


@pytest.mark.parametrize("entry", [0.5, "x", [1]])
def test_a_quantization_config_that_is_none(model: Path, entry: object) -> None:
    edit_json(model / "config.json", lambda config: config.update(quantization_config=entry))
    with pytest.raises(ModelError, match="quantization_config is not a JSON object"):
        Checkpoint(model, allow_quantized=True)
