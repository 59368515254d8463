"""Recipes: what is read, what is refused, and that a refusal is one line with the place and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moe_rco import recipe as recipes
from moe_rco.errors import RecipeError
from moe_rco.recipe import Recipe, load, parse
from moe_rco.types import BF16, PRUNE, Option
from tests.conftest import MINIMAL


def message(text: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml", overrides)
    line = str(caught.value)
    assert "\n" not in line
    assert "pydantic" not in line
    return line


def test_minimal_recipe_and_its_defaults() -> None:
    recipe = parse(MINIMAL)
    assert recipe.options == (PRUNE, Option(4, 64), Option(8, 64), BF16)
    assert [budget.ratio for budget in recipe.budget] == [0.25]
    assert [(source.data, source.weight) for source in recipe.calibration.data] == [("demo", 1.0)]
    assert recipe.search.method == "rco"
    assert recipe.layout == "mixed"
    assert recipe.quantizer.method == "gptq"


@pytest.mark.parametrize("name", ["demo", "qwen-moe", "mixtral"])
def test_shipped_recipes_are_valid_and_found_by_name(name: str) -> None:
    assert name in recipes.shipped()
    assert load(name) == load(f"{name}.yaml") == load(recipes.shipped()[name])


def test_every_shipped_recipe_loads() -> None:
    for path in recipes.shipped().values():
        assert parse(load(path).to_yaml()) == load(path)


def test_a_local_file_goes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text(MINIMAL)
    assert load("demo.yaml").output == "out/test"
    assert load("demo").output == "out/demo"


REFUSED = [
    # what stands in the recipe, what is put there, and what the message has to say
    ("output:", "outptu:", ["r.yaml:7: outptu: unknown key; did you mean 'output'?", "(and 1 more)"]),
    ("ratio:", "ratoi:", ["r.yaml:4: budget.ratoi: unknown key; did you mean 'ratio'?"]),
    ("  data:", "  dta: x\n  data:", ["r.yaml:6: calibration.dta: unknown key; did you mean 'data'?"]),
    ("  data: demo", "  data: [{data: a, wieght: 2}]", ["r.yaml:6: calibration.data.0.wieght", "'weight'"]),
    ("model: demo\n", "", ["r.yaml: model: this key is missing"]),
    ("model: demo", "model: ''", ["r.yaml:2: model: must not be empty"]),
    ("model: demo", "model: 3", ["r.yaml:2: model: must be a valid string, not 3"]),
    ("version: 1", "version: 2", ["r.yaml:1: version: this program reads recipes of version 1, not 2"]),
    ("version: 1", "version: true", ["r.yaml:1: version"]),
    (
        "{ratio: 0.25}",
        "{ratio: 0.25, bytes: 12MiB}",
        ["r.yaml:4: budget: two budget forms, 'bytes' and 'ratio'"],
    ),
    ("{ratio: 0.25}", "{}", ["r.yaml:4: budget: no budget given", "bytes", "ratio", "avg_bits"]),
    ("{ratio: 0.25}", "", ["r.yaml:4: budget: no budget given"]),
    ("{ratio: 0.25}", "12", ["r.yaml:4: budget: say what 12 counts"]),
    ("{ratio: 0.25}", "'12'", ["r.yaml:4: budget: say what 12 counts"]),
    ("{ratio: 0.25}", "0.25", ["r.yaml:4: budget: say what 0.25 counts"]),
    ("{ratio: 0.25}", "lots", ["r.yaml:4: budget: say what lots counts"]),
    ("{ratio: 0.25}", "12Mob", ["r.yaml:4: budget: say what 12Mob counts"]),
    ("{ratio: 0.25}", "0%", ["r.yaml:4: budget: a budget in % must be greater than 0%", "not 0%"]),
    ("{ratio: 0.25}", "135%", ["r.yaml:4: budget: a budget in %", "at most 100%, not 135%"]),
    ("{ratio: 0.25}", "[]", ["r.yaml:4: budget: must not be empty"]),
    ("{ratio: 0.25}", "[50%,\n  0.3]", ["r.yaml:5: budget.1: say what 0.3 counts"]),
    (
        "{ratio: 0.25}",
        "[50%,\n  {ratoi: 0.3}]",
        ["r.yaml:5: budget.1.ratoi: unknown key; did you mean 'ratio'?"],
    ),
    ("{ratio: 0.25}", "[50%,\n  {ratio: 0.5}]", ["r.yaml:5: budget.1: ratio 0.5 is listed twice"]),
    ("{ratio: 0.25}", "[50%, [35%]]", ["budget.1: a list within the list of budgets"]),
    ("{ratio: 0.25}", "[50%, ]\nlayout: x", ["layout: must be"]),
    ("{ratio: 0.25}", "{fit: {gpu: 24GiB}}", ["fit.gpu: unknown key", "gpu_memory"]),
    ("{ratio: 0.25}", "{fit: 24}", ["fit", "as in 24GB"]),
    ("{ratio: 0.25}", "{fit: 24 apples}", ["24 apples", "is not a size"]),
    ("ratio: 0.25", "ratio: 0", ["budget.ratio: must be greater than 0, not 0"]),
    ("ratio: 0.25", "ratio: -0.25", ["budget.ratio: must be greater than 0, not -0.25"]),
    ("ratio: 0.25", "ratio: 1.5", ["budget.ratio: must be less than or equal to 1, not 1.5"]),
    ("ratio: 0.25", "ratio: .nan", ["budget.ratio: must be a finite number"]),
    ("ratio: 0.25", "ratio: true", ["budget.ratio: must be a valid number, not true"]),
    ("ratio: 0.25", "ratio: '0.25'", ["budget.ratio: must be a valid number, not '0.25'"]),
    ("ratio: 0.25", "avg_bits: .inf", ["budget.avg_bits: must be a finite number"]),
    ("ratio: 0.25", "avg_bits: 0", ["budget.avg_bits: must be greater than 0"]),
    ("ratio: 0.25", "bytes: 0", ["budget.bytes: a size must be greater than zero"]),
    ("ratio: 0.25", "bytes: -5", ["budget.bytes: a size must be greater than zero"]),
    ("ratio: 0.25", "bytes: 12Mob", ["budget.bytes: '12Mob' is not a size", "12MiB"]),
    ("ratio: 0.25", "bytes: true", ["budget.bytes"]),
    ("ratio: 0.25", "bytes: 1.5", ["budget.bytes"]),
    ("int4-g64", "int4-64", ["r.yaml:3: options.1: unknown option 'int4-64'; did you mean 'int4-g64'?"]),
    ("int4-g64", "int8-g64", ["r.yaml:3: options: 'int8-g64' is listed twice"]),
    ("int4-g64", "int3-g64", ["r.yaml:3: options: int3-g64", "experimental: true"]),
    ("int4-g64", "4", ["options.1: an option is a word such as prune or int4-g64, not 4"]),
    ("[prune, int4-g64, int8-g64, bf16]", "[]", ["r.yaml:3: options: must not be empty"]),
    ("[prune, int4-g64, int8-g64, bf16]", "prune", ["r.yaml:3: options: must be a list, not 'prune'"]),
    ("[prune, int4-g64, int8-g64, bf16]", "[prune]", ["options: at least one option must keep an expert"]),
    (
        "output:",
        "layout: stok\noutput:",
        ["layout: must be 'mixed' or 'stock', not 'stok'; did you mean 'stock'?"],
    ),
    ("output:", "layout:\n\n    stok\noutput:", ["r.yaml:7: layout: must be 'mixed' or 'stock', not 'stok'"]),
    (
        "output:",
        "layout: mixd\noutput:",
        ["layout: must be 'mixed' or 'stock', not 'mixd'; did you mean 'mixed'?"],
    ),
    (
        "int4-g64, int8-g64, bf16]",
        "int2-g64, int3]\nlayout: stock\nexperimental: true",
        ["r.yaml:3: options: int2-g64 and int3", "neither vLLM nor transformers", "layout: mixed"],
    ),
    ("output:", "execution: {device: gpu}\noutput:", ["execution.device: must be auto, cpu", "not 'gpu'"]),
    ("output:", "execution: steaming\noutput:", ["execution.mode: must be", "did you mean 'streaming'?"]),
    ("output:", "execution: {memory_limit: lots}\noutput:", ["execution.memory_limit: 'lots' is not a size"]),
    ("output:", "quantizer: {method: gptqq}\noutput:", ["quantizer.method", "did you mean 'gptq'?"]),
    (
        "output:",
        "search: {samples: 3}\noutput:",
        ["r.yaml:7: search.samples: must be a multiple of 2, not 3"],
    ),
    ("output:", "search: {steps: 2.0}\noutput:", ["search.steps: must be a valid integer, not 2.0"]),
    ("output:", "search:\n  steps: 3\n  seed: -1\noutput:", ["r.yaml:9: search.seed: must be greater"]),
    ("output:", "search: {tau_end: 2}\noutput:", ["r.yaml:7: search.tau_end: must not be greater than"]),
    ("output:", "search: {method: evolutoin}\noutput:", ["r.yaml:7: search.method", "did you mean"]),
    (
        "output:",
        "search: {method: evolution}\nlayout: stock\noutput:",
        ["r.yaml:7: search.method: evolution knows layout mixed only"],
    ),
    (
        "[prune, int4-g64, int8-g64, bf16]",
        "[int4-g64, bf16]\nsearch: {method: reap}",
        ["search.method: reap prunes experts: 'prune' must be among the options"],
    ),
    ("output:", "search: 7\noutput:", ["r.yaml:7: search: must be a mapping of keys to values, not 7"]),
    ("output:", "experimental: yes\noutput:", ["r.yaml:7: experimental: must be a valid boolean, not 'yes'"]),
    ("  data: demo", "  data: []", ["r.yaml:6: calibration.data: must not be empty"]),
    ("  data: demo", "  data: ''", ["r.yaml:6: calibration.data: must not be empty"]),
    ("  data: demo", "  data: demo\n  holdout: 1", ["r.yaml:7: calibration.holdout: must be less than 1"]),
    ("  data: demo", "  data: demo\n  sequences: 1", ["calibration.sequences: must be greater than"]),
    (
        "  data: demo",
        "  data: demo\n  data: x",
        ["r.yaml:7: calibration.data: this key stands twice", "line 6"],
    ),
    ("  data: demo", "  data: &a demo", ["r.yaml:6: not valid YAML: anchors and aliases"]),
    ("  data: demo", "  data: *a", ["r.yaml:6: not valid YAML: anchors and aliases"]),
    ("  data: demo", "  data: !!python/object:os.system x", ["r.yaml:6:"]),
    ("  data: demo", "  data: !mine {a: 1}", ["r.yaml:6: tags such as !mine are not allowed"]),
    ("  data: demo", "  data: [demo", ["not valid YAML"]),
    ("  data: demo", "  1: demo", ["r.yaml:6: a key must be a word, not '1'"]),
    ("  data: demo", "  data: \a", ["r.yaml: not valid YAML"]),
    ("{ratio: 0.25}", "[" * 500 + "]" * 500, ["r.yaml:4: not valid YAML: nested more than"]),
    ("ratio: 0.25", "bytes: " + "9" * 5000, ["r.yaml:4:"]),
    (MINIMAL, "", ["r.yaml: the recipe is empty"]),
    (MINIMAL, "# only a comment\n", ["r.yaml: the recipe is empty"]),
    (MINIMAL, "- version\n", ["r.yaml:1: a recipe is a mapping of keys to values"]),
    (MINIMAL, MINIMAL + "---\n" + MINIMAL, ["not valid YAML"]),
]


@pytest.mark.parametrize(("old", "new", "expected"), REFUSED)
def test_wrong_recipes_are_refused_in_one_line(old: str, new: str, expected: list[str]) -> None:
    assert old in MINIMAL
    line = message(MINIMAL.replace(old, new))
    for part in expected:
        assert part in line
    assert len(line) < 400


def test_a_misspelt_key_is_named_before_the_missing_one_and_the_count_is_told() -> None:
    line = message(MINIMAL.replace("model:", "modle:").replace("budget:", "budgte:"))
    assert line.startswith("r.yaml:2: modle: unknown key; did you mean 'model'?")
    assert line.endswith("(and 3 more)")


def test_words_read_as_in_yaml_1_2() -> None:
    text = MINIMAL.replace("data: demo", "data: no\n  sequences: 010\n  holdout: 5e-1")
    recipe = parse(text + "search: {learning_rate: 1e-3}\n")
    assert recipe.calibration.data[0].data == "no"
    assert recipe.calibration.sequences == 10
    assert recipe.calibration.holdout == 0.5
    assert recipe.search.learning_rate == 1e-3


def test_an_empty_section_means_its_defaults() -> None:
    assert parse(MINIMAL + "search:\nquantizer:\n") == parse(MINIMAL)


def test_execution_may_be_the_mode_alone() -> None:
    assert parse(MINIMAL + "execution: streaming\n") == parse(MINIMAL + "execution: {mode: streaming}\n")


def test_overrides_change_any_key() -> None:
    overrides = (
        "search.steps=7",
        "budget.bytes=12MiB",
        "options=[prune, bf16]",
        "calibration.data=[a.txt, b.txt]",
    )
    recipe = parse(MINIMAL, "r.yaml", overrides)
    assert recipe.search.steps == 7
    assert [(budget.bytes, budget.ratio) for budget in recipe.budget] == [(12 * 2**20, None)]
    assert recipe.options == (PRUNE, BF16)
    assert [source.data for source in recipe.calibration.data] == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("search.stpes=3", "--set search.stpes=3: search.stpes: unknown key; did you mean 'steps'?"),
        ("serach.steps=3", "--set serach.steps=3: serach: unknown key; did you mean 'search'?"),
        ("search.steps=x", "--set search.steps=x: search.steps: must be a valid integer, not 'x'"),
        ("search.steps", "--set search.steps: write key=value"),
        ("=3", "--set =3: write key=value"),
        ("options.x=3", "--set options.x=3: options has no keys of its own"),
        ("model.x.y=3", "--set model.x.y=3: model has no keys of its own"),
        ("search={steps: 1, steps: 2}", "this key stands twice"),
        ("search=[", "--set search=["),
        ("budget={ratio: 0.1, bytes: 5}", "budget: two budget forms, 'bytes' and 'ratio'"),
        ("calibration={data: 3}", "--set calibration={data: 3}: calibration.data: must be a list, not 3"),
        ("output=35", "--set output=35: output: must be a valid string, not 35"),
    ],
)
def test_wrong_overrides_are_named(override: str, expected: str) -> None:
    assert expected in message(MINIMAL, (override,))


def test_two_budget_forms_among_the_overrides_are_a_contradiction() -> None:
    line = message(MINIMAL, ("budget.bytes=12MiB", "budget.ratio=0.3"))
    assert line.startswith("--set budget.ratio=0.3: budget: two budget forms, 'bytes' and 'ratio'")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("35%", "{ratio: 0.35}"),
        ("' 7.5 % '", "{ratio: 0.075}"),
        ("20GiB", "{bytes: 21474836480}"),
        ("1.5 GB", "{bytes: 1500000000}"),
        ("[50%, 12MiB, {avg_bits: 4.25}]", "[{ratio: 0.5}, {bytes: 12582912}, {avg_bits: 4.25}]"),
        ("[50%]", "{ratio: 0.5}"),
    ],
)
def test_short_budgets_and_lists(written: str, meant: str) -> None:
    recipe = parse(MINIMAL.replace("{ratio: 0.25}", written))
    assert recipe == parse(MINIMAL, overrides=[f"budget={meant}"]) == parse(recipe.to_yaml())
    assert recipe == parse(MINIMAL, overrides=[f"budget={written}"])
    assert recipe.digest() == parse(recipe.to_yaml()).digest() != parse(MINIMAL).digest()


@pytest.mark.parametrize("budget", ["35%", "[50%, 35%]", "{ratio: 0.35}"])
def test_a_form_as_override_replaces_any_budget(budget: str) -> None:
    changed = parse(MINIMAL.replace("{ratio: 0.25}", budget), overrides=["budget.bytes=12MiB"])
    assert [one.bytes for one in changed.budget] == [12 * 2**20]
    assert "--set budget.bytes=0: budget.bytes: a size must be" in message(
        MINIMAL.replace("{ratio: 0.25}", budget), ("budget.bytes=0",)
    )


def test_no_such_recipe_lists_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError,
        match=r"no such recipe file; did you mean 'qwen-moe'\?.*demo, mixtral-8x7b-24gb.*, qwen-moe, ",
    ):
        load("qwen_moe.yaml")
    with pytest.raises(RecipeError, match="is a directory, not a recipe file"):
        load(tmp_path)
    binary = tmp_path / "x.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        load(binary)


def test_digest_covers_what_decides_the_result_and_nothing_else() -> None:
    base = parse(MINIMAL)
    # Work directories of interrupted runs depend on it.
    assert base.digest() == "e559d8d688967cff4877f1b0118b67727c4b7414f6b6a777a295d6993775c492"
    assert parse(MINIMAL + "# a comment\n").digest() == base.digest()
    assert parse(MINIMAL + "search: {steps: 300}\n").digest() == base.digest()
    assert parse(MINIMAL, overrides=["output=elsewhere"]).digest() == base.digest()
    for change in (
        "search.seed=1",
        "budget.ratio=0.26",
        "model=x",
        "calibration.sequences=9",
        "execution.dtype=float32",
        "layout=stock",
    ):
        assert parse(MINIMAL, overrides=[change]).digest() != base.digest()
        assert parse(MINIMAL, overrides=[change]).search_digest() != base.search_digest()
    for change in ("execution.mode=streaming", "execution.memory_limit=20GiB"):
        assert parse(MINIMAL, overrides=[change]).digest() != base.digest()
        assert parse(MINIMAL, overrides=[change]).search_digest() == base.search_digest()


@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1),
    st.floats(1e-9, 1.0),
    st.integers(0, 2**63 - 1),
)
@example("1e-3", 0.5, 0)
@example("no", 1e-5, 0)
def test_yaml_round_trip(text: str, ratio: float, seed: int) -> None:
    data = parse(MINIMAL).model_dump(mode="json", exclude_none=True)
    data |= {"model": text, "budget": {"ratio": ratio}, "search": {"seed": seed, "learning_rate": ratio}}
    recipe = Recipe.model_validate(data)
    assert parse(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("sequences", "holdout", "expected"), [(10, 0.2, 2), (2, 0.9, 1), (3, 0.01, 1), (100, 0.99, 99)]
)
def test_both_sides_of_the_holdout_keep_a_sequence(sequences: int, holdout: float, expected: int) -> None:
    recipe = parse(
        MINIMAL, overrides=[f"calibration.sequences={sequences}", f"calibration.holdout={holdout}"]
    )
    assert recipe.calibration.holdout_sequences == expected


def test_model_directory(tmp_path: Path) -> None:
    assert parse(MINIMAL, overrides=[f"model={tmp_path}"]).model_directory == tmp_path
    assert parse(MINIMAL, overrides=["model=Qwen/Qwen3-30B-A3B"]).model_directory is None


@pytest.mark.parametrize(
    "key",
    [
        "budget.bytes",
        "budget.ratio",
        "search.steps",
        "search.seed",
        "search.learning_rate",
        "execution.memory_limit",
        "calibration.sequences",
    ],
)
def test_numbers_beyond_all_bounds_are_refused(key: str) -> None:
    with pytest.raises(RecipeError, match=key.rpartition(".")[2]):
        load("demo", [f"{key}={'9' * 400}"])


@pytest.mark.parametrize("line", [r'"\ud800": 1', r'model: "a\udfffb"', r'calibration: {data: "\ud800"}'])
def test_half_a_character_is_refused(line: str) -> None:
    with pytest.raises(RecipeError, match=r"recipe:1: not valid YAML: half a character"):
        recipes.parse(line)


def test_a_file_that_is_far_too_long_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "long.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(RecipeError, match="is not a recipe"):
        load(path)


def test_a_part_of_fit_is_another_form_than_the_recipe_s() -> None:
    changed = parse(MINIMAL, overrides=["budget.fit.gpu_memory=24GB", "budget.fit.max_num_seqs=2"])
    (budget,) = changed.budget
    assert budget.fit is not None
    assert (budget.ratio, budget.fit.gpu_memory, budget.fit.max_num_seqs) == (None, 24 * 10**9, 2)
    (again,) = parse(changed.to_yaml(), overrides=["budget.fit.max_model_len=64"]).budget
    assert again.fit == budget.fit.model_copy(update={"max_model_len": 64})
    with pytest.raises(RecipeError, match="two budget forms, 'fit' and 'ratio'"):
        parse(MINIMAL, overrides=["budget.fit.gpu_memory=24GB", "budget.ratio=0.5"])
    with pytest.raises(RecipeError, match=r"fit\.max_modellen: unknown key; did you mean 'max_model_len'"):
        parse(MINIMAL, overrides=["budget.fit.max_modellen=24"])
