"""Reloading with transformers: the same logits as an independent reference, and no word of complaint."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from moe_rco.serve.experts import PackedLinear, RoutedExperts
from moe_rco.serve.hf import register
from tests.compressed import EVERY_OPTION, Job, random_job
from tests.serve.reference import reference_model
from tests.tiny_models import FAMILIES, save_tiny

register()

IDS = torch.randint(3, 96, (3, 17), generator=torch.Generator().manual_seed(0))


class Written:
    """A tiny model of one family, compressed."""

    def __init__(self, base: Path, family: str, seed: int = 0, **overrides: Any) -> None:
        self.job: Job = random_job(save_tiny(family, base / "model", **overrides), base / "store", seed)
        self.directory = base / "out"
        self.job.write(self.directory)

    def load(self, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.directory, dtype=dtype, **settings)


@pytest.fixture(scope="module", params=FAMILIES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def silence() -> Iterator[None]:
    """Fails the test if transformers logs a warning or Python issues one."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    root = transformers_logging.get_logger()
    root.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    root.removeHandler(handler)
    assert [record.getMessage() for record in records] == []


@torch.no_grad()
def difference(model: Any, other: Any) -> float:
    a, b = model(IDS).logits.float(), other(IDS).logits.float()
    assert a.isfinite().all()
    return float((a - b).abs().max())


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_references(tmp_path: Path, family: str, seed: int) -> None:
    written = Written(tmp_path, family, seed)
    reference = reference_model(written.job, written.directory)
    with torch.no_grad():
        spread = reference(IDS).logits.std()
    assert spread > 0.3
    assert difference(written.load(), reference) < 1e-4


@pytest.mark.parametrize("option", [name for name in EVERY_OPTION if name != "prune"])
def test_every_option_alone(tmp_path: Path, option: str) -> None:
    model = save_tiny("qwen3_moe", tmp_path / "model", num_experts=4, num_hidden_layers=1)
    job = random_job(model, tmp_path / "store", 0, (option,))
    job.write(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert difference(loaded, reference_model(job, tmp_path / "out")) < 1e-4


def test_pruning_alone(tmp_path: Path) -> None:
    job = random_job(save_tiny("qwen2_moe", tmp_path / "model"), tmp_path / "store", 0, ("prune", "bf16"))
    job.write(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    reference = reference_model(job, tmp_path / "out")
    assert difference(loaded, reference) < 1e-4
    original = AutoModelForCausalLM.from_pretrained(job.checkpoint.directory, dtype=torch.float32)
    assert difference(original, reference) > 0.1


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("qwen3_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2}),
        ("qwen2_moe", {"num_hidden_layers": 4, "mlp_only_layers": [0, 2]}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("qwen3_moe", {"tie_word_embeddings": True}),
        ("mixtral", {"num_experts_per_tok": 1}),
    ],
)
def test_variants_of_the_families(
    tmp_path: Path, silence: None, family: str, overrides: dict[str, Any]
) -> None:
    written = Written(tmp_path, family, **overrides)
    assert difference(written.load(), reference_model(written.job, written.directory)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_is_silent_and_complete(written: Written, silence: None, dtype: torch.dtype) -> None:
    model, info = written.load(dtype, output_loading_info=True)
    assert not any(info.values())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_the_dtype_on_disk_is_the_default(written: Written) -> None:
    model = AutoModelForCausalLM.from_pretrained(written.directory)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_bfloat16_is_close(written: Written) -> None:
    with torch.no_grad():
        exact, rounded = written.load()(IDS).logits, written.load(torch.bfloat16)(IDS).logits
    assert rounded.dtype == torch.bfloat16
    # Single tokens may route otherwise in bfloat16; most do not.
    assert (exact - rounded.float()).abs().median() < 0.05 * exact.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate(written: Written, silence: None, dtype: torch.dtype) -> None:
    model = written.load(dtype)
    text = model.generate(IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert text.shape == (3, 22)
    if dtype == torch.float32:
        with torch.no_grad():
            assert torch.equal(model(text).logits[:, -2].argmax(-1), text[:, -1])


def test_resident_bytes_are_the_plans(written: Written) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        experts = [module for module in written.load(dtype).modules() if isinstance(module, RoutedExperts)]
        assert len(experts) == len(written.job.assignment.table.layers)
        assert not any(list(module.parameters()) for module in experts)
        size = sum(buffer.untyped_storage().nbytes() for module in experts for buffer in module.buffers())
        assert size == written.job.plan.cost


def test_casting_leaves_the_packed_tensors(written: Written) -> None:
    model = written.load()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if ".experts." in name}
    for dtype in (torch.float16, torch.float64, torch.float32):
        for module in model.modules():
            if isinstance(module, RoutedExperts):
                module.to(dtype)
        after = {name: buffer for name, buffer in model.named_buffers() if ".experts." in name}
        assert all(after[name].dtype == before[name].dtype for name in before)
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_saving_again(written: Written, silence: None, tmp_path: Path) -> None:
    model = written.load(torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert difference(model, again) == 0


def test_the_base_model_loads(written: Written, tmp_path: Path) -> None:
    base = AutoModel.from_pretrained(written.directory, dtype=torch.float32)
    whole = written.load()
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def test_router_logits_can_be_recorded(written: Written) -> None:
    with torch.no_grad():
        recorded = written.load()(IDS, output_router_logits=True).router_logits
    assert len(recorded) == len(written.job.assignment.table.layers)
    assert all(logits.shape == (IDS.numel(), 8) for logits in recorded)


def test_device_map(written: Written) -> None:
    pytest.importorskip("accelerate")
    assert difference(written.load(device_map="auto"), written.load()) == 0
    assert difference(written.load(device_map={"": "cpu"}), written.load()) == 0


def test_device_map_offloads_to_disk(written: Written, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    layers = {f"model.layers.{layer}": place for layer, place in enumerate(("cpu", "disk"))}
    places = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
        **layers,
    }
    model = written.load(torch.bfloat16, device_map=places, offload_folder=tmp_path)
    assert difference(model, written.load(torch.bfloat16)) == 0


def test_registering_again_does_nothing() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    before = dict(AUTO_QUANTIZER_MAPPING)
    finders = list(sys.meta_path)
    register()
    assert before == AUTO_QUANTIZER_MAPPING
    assert sys.meta_path == finders


LAZY = """
import sys
from moe_rco.serve.hf import register
register(); register()
assert not {"torch", "transformers", "moe_rco.serve.quantizer"} & sys.modules.keys()
import transformers
assert "moe_rco.serve.quantizer" not in sys.modules
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "RoutedExperts" in repr(model)
"""


def test_registration_waits_for_transformers(tmp_path: Path) -> None:
    directory = Written(tmp_path, "qwen3_moe").directory
    subprocess.run([sys.executable, "-c", LAZY, str(directory)], check=True, capture_output=True)


def test_a_copied_model_works(written: Written) -> None:
    import copy

    model = written.load()
    assert difference(copy.deepcopy(model), model) == 0


def test_without_the_original(written: Written, tmp_path: Path) -> None:
    """The output stands alone: it loads wherever it is moved."""
    moved = shutil.copytree(written.directory, tmp_path / "moved")
    assert difference(AutoModelForCausalLM.from_pretrained(moved, dtype=torch.float32), written.load()) == 0


def test_modules_say_what_they_are(written: Written) -> None:
    linear = next(module for module in written.load().modules() if isinstance(module, PackedLinear))
    assert str(linear.option) in repr(linear)
