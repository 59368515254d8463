"""Publishing as a user does it, to a server that speaks the Hub's interface (`tests/hub.py`): what arrives, what is refused."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard, constants, snapshot_download

from moe_rco import cli
from moe_rco.ckpt.manifest import NOT_LISTED, Manifest
from moe_rco.ckpt.workdir import WorkDirectory
from moe_rco.report import Report
from tests import hub as hubs
from tests.documents import ROOT, commands
from tests.hub import STRANGER, TOKEN, Hub, sha256
from tests.running import Start, starting
from tests.tiny_job import save_job

pytestmark = pytest.mark.slow
REPO = "you/Tiny-17"


def moe_rco(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hubs.serving() as found:
        yield found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("push")
    save_job(place, steps=2, refine=2)
    return place


@pytest.fixture(autouse=True, scope="module")
def client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with hubs.logged_in(hub, tmp_path_factory.mktemp("home")):
        yield


@pytest.fixture(scope="module")
def pruned(hub: Hub, place: Path) -> Result:
    """A run with --push-to-hub, which the Hub refuses when it has finished."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("moe_rco.pipeline.stage_times", lambda *_: {})  # its measurement takes seconds
        hub.refusals["POST /api/models/you/Tiny-17/commit"] = (413, "the repository is full")
        words = ("--recipe", "recipe.yaml", "--push-to-hub", REPO, "--private")
        result = moe_rco("prune", *words)
        hub.refusals.clear()
    return result


@pytest.fixture
def output(pruned: Result, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished output; the current directory is the one it is in."""
    monkeypatch.chdir(place)
    return Path("out")


@pytest.fixture
def published(hub: Hub, output: Path) -> Hub:
    result = moe_rco("push", output, REPO)
    assert result.exit_code == 0, result.output
    return hub


def refused(result: Result) -> str:
    """The one line of an error."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert result.stderr.splitlines()[-1] == errors[0]
    assert TOKEN not in result.output
    return errors[0]


def test_a_push_that_fails_after_the_run_loses_nothing(hub: Hub, pruned: Result, output: Path) -> None:
    assert pruned.exit_code == 2
    assert "Written to out" in pruned.stdout
    error = pruned.stderr.splitlines()[-1]
    assert error.startswith(f"error: {REPO}: the Hub refuses (413: the repository is full); `moe-rco push ")
    assert Report.load(output).own_digest == Report.load(output).digest
    assert not WorkDirectory.of(output).path.exists()
    words = shlex.split(error.split("`")[1])[1:]
    assert words == ["push", "out", REPO, "--private"]
    again = moe_rco(*words)
    assert again.exit_code == 0, again.output
    assert hub.repositories[REPO].private


def test_every_byte_arrives_and_nothing_else(published: Hub, output: Path, tmp_path: Path) -> None:
    copy = Path(snapshot_download(REPO, endpoint=published.url, local_dir=tmp_path / "copy"))
    manifest = Manifest.load(output)
    for name, file in manifest.files.items():
        assert sha256((copy / name).read_bytes()) == file.sha256, name
    for name in NOT_LISTED:
        assert (copy / name).read_bytes() == (output / name).read_bytes(), name
    there = {path.name for path in copy.iterdir()} - {".cache", ".gitattributes"}
    assert there == {*manifest.files, *NOT_LISTED, "README.md"}
    verified = moe_rco("verify", copy)
    assert verified.exit_code == 0, verified.output
    assert not any(TOKEN.encode() in data for data in published.files(REPO).values())


def test_transformers_loads_it_by_its_name(published: Hub) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(REPO)
    assert model.config.quantization_config.quant_method == "moe_rco"


def test_the_card_is_what_the_hub_reads_and_has_the_report_s_figures(published: Hub, output: Path) -> None:
    text, report = published.files(REPO)["README.md"].decode(), Report.load(output)
    data = ModelCard(text).data.to_dict()
    assert "base_model" not in data  # a directory of this machine
    assert data["library_name"] == "transformers"
    assert "vllm" in data["tags"]
    for figure in (f"{report.kl:.5f}", f"{report.losses[0]:.4f}", f"{report.losses[1]:.4f}", report.manifest):
        assert figure in text
    assert f"vllm serve {REPO}\n" in text
    assert str(Path.cwd()) not in text


def test_the_card_alone_asks_nobody(hub: Hub, output: Path) -> None:
    before = len(hub.requests)
    result = moe_rco("push", output, REPO, "--card")
    assert result.exit_code == 0, result.output
    assert ModelCard(result.stdout).data.to_dict()["pipeline_tag"] == "text-generation"
    assert len(hub.requests) == before


def test_only_what_is_missing_is_sent_again(published: Hub, output: Path) -> None:
    received, head = published.received, published.repositories[REPO].branches["main"]
    assert received == sum(path.stat().st_size for path in output.glob("*.safetensors"))
    again = moe_rco("push", output, REPO)
    assert again.exit_code == 0, again.output
    assert (published.received, published.repositories[REPO].branches["main"]) == (received, head)
    assert head in again.stderr
    del published.files(REPO)["plan.json"]
    assert moe_rco("push", output, REPO).exit_code == 0
    assert published.sent[-1] == ["plan.json"]
    assert published.received == received


def test_a_branch_and_a_card_of_one_s_own(published: Hub, output: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(output, tmp_path / "copy")
    (copy / "README.md").write_text("---\nlicense: apache-2.0\n---\n\nMine.\n")
    result = moe_rco("push", copy, REPO, "--revision", "v2")
    assert result.exit_code == 0, result.output
    data = ModelCard(published.files(REPO, "v2")["README.md"].decode()).data.to_dict()
    assert data["license"] == "apache-2.0"
    assert b"Mine." not in published.files(REPO)["README.md"]


def test_a_card_that_the_hub_cannot_read_is_one_line(published: Hub, output: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(output, tmp_path / "copy")
    (copy / "README.md").write_text("---\ntags: [1]\n---\n")
    sent = len(published.sent)
    assert "publishing failed (Invalid metadata in README.md." in refused(moe_rco("push", copy, REPO))
    assert len(published.sent) == sent


def test_paths_of_this_machine_are_named_before_they_are_published(published: Hub, output: Path) -> None:
    result = moe_rco("push", output, REPO)
    (note,) = (line for line in result.stderr.splitlines() if line.startswith("note: "))
    model = json.loads((output / "report.json").read_text())["model"]
    assert model.startswith("/")
    assert model in note
    assert f"{model}/text.jsonl" in note


def test_the_page_s_commands_work(
    published: Hub, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that publish; the others are read by the programs that would run them."""
    for place in ("demo", "curve/35pct"):
        shutil.copytree(output, tmp_path / "out" / place)
    monkeypatch.chdir(tmp_path)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in commands((ROOT / "docs" / "publishing.md").read_text(encoding="utf-8")):
        typed, _, file = command.partition(" > ")
        program, *words = shlex.split(typed)
        if program == "moe-rco" and words[0] == "push":
            result = moe_rco(*words)
            assert result.exit_code == 0, (command, result.output)
            if file:
                Path(file).write_text(result.stdout)
        elif program == "moe-rco":
            cli.app.commands[words[0]].make_context(words[0], words[1:])
        elif program == "pip":
            assert set(words[-1].strip(".[]").split(",")) <= set(extras)
        else:
            assert program in {entry.name for entry in entry_points(group="console_scripts")}
    assert published.files("you/demo-25")["README.md"] == Path("out/demo/README.md").read_bytes()
    assert published.repositories["you/demo-25"].private


def no_login(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("HF_TOKEN")


def wrong_token(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_TOKEN", "hf_anotherTokenAnotherTokenAnotherTo")


def server_down(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def offline(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "HF_HUB_OFFLINE", True)


def no_hub(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    """Something else answers there, as a proxy that wants a log-in."""
    hub.refusals["POST /api/repos/create"] = (200, "welcome")


def read_only_token(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.refusals["POST /api/repos/create"] = (403, "this token may only read")


def strangers(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.repositories.setdefault(f"{STRANGER}/Model", hubs.Repository()).add("main", {})


REFUSALS: tuple[tuple[Callable[[Hub, pytest.MonkeyPatch], None], str, str], ...] = (
    (no_login, REPO, "nobody is logged in to the Hub here; say `hf auth login`, or set HF_TOKEN"),
    (wrong_token, REPO, "the Hub does not accept the token (401: "),
    (server_down, REPO, "http://127.0.0.1:9 cannot be reached ("),
    (offline, REPO, "HF_HUB_OFFLINE forbids to ask the Hub; unset it"),
    (no_hub, "you/new", "does not answer as the Hub does"),
    (read_only_token, "you/new", "the Hub does not let this token write there (403: this token may only read)"),
    (strangers, f"{STRANGER}/Model", "the Hub does not let this token write there (403: Forbidden"),
    (strangers, "nobody-at-all/Model", "the Hub does not let this token write there (403: You don't have the rights"),
    (strangers, "a b/c", "'a b/c' is no name of a repository, such as you/your-model: Repo id must use"),
    (strangers, "you/a/b", "'you/a/b' is no name of a repository"),
)  # fmt: skip


@pytest.fixture(params=REFUSALS, ids=lambda case: f"{case[0].__name__} {case[1]}")
def refusal(
    request: pytest.FixtureRequest, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, str]]:
    arrange, repo, told = request.param
    arrange(hub, monkeypatch)
    yield repo, told
    hub.refusals.clear()


def test_what_the_hub_refuses_is_one_line(hub: Hub, output: Path, refusal: tuple[str, str]) -> None:
    repo, told = refusal
    sent = len(hub.sent), hub.received
    assert told in refused(moe_rco("push", output, repo))
    assert (len(hub.sent), hub.received) == sent


def test_it_is_told_before_the_long_work(
    hub: Hub, place: Path, refusal: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("moe_rco.pipeline.stage_times", lambda *_: {})
    repo, told = refusal
    result = moe_rco("prune", "--recipe", "recipe.yaml", "--output", "later", "--push-to-hub", repo)
    assert told in result.stderr.splitlines()[-1]
    assert result.exit_code == 2
    assert "calibrate" not in result.stderr
    assert not Path("later").exists()
    shutil.rmtree("later.work", ignore_errors=True)


def test_a_dry_run_makes_no_repository(hub: Hub, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("moe_rco.checks.stage_times", lambda *_: {})
    words = ("prune", "--recipe", "recipe.yaml", "--output", "later", "--dry-run", "--push-to-hub", "you/dry")
    assert moe_rco(*words).exit_code == 0
    assert "you/dry" not in hub.repositories
    monkeypatch.delenv("HF_TOKEN")
    assert "nobody is logged in" in refused(moe_rco(*words))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--private",), "add --push-to-hub REPO"),
        (("--push-to-hub", REPO, "--set", "budget=[50%,30%]"), "has several budgets; use `moe-rco push` for each"),
    ],
)  # fmt: skip
def test_contradictions(
    place: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], told: str
) -> None:
    monkeypatch.chdir(place)
    assert told in refused(moe_rco("prune", "--recipe", "recipe.yaml", *words))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["model-00001-of-00001.safetensors", "plan.json", "manifest.json", "report.json", "report.html", "recipe.yaml"]
)  # fmt: skip
def test_a_damaged_output_is_not_published(hub: Hub, output: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(output, tmp_path / "copy")
    flipped(copy / name)
    sent = len(hub.sent)
    refused(moe_rco("push", copy, REPO))
    assert len(hub.sent) == sent


def several(place: Path) -> Path:
    (place / "curve.json").write_text("{}")
    return place


UNFINISHED: tuple[tuple[Callable[[Path], Path], str], ...] = (
    (several, "holds a model for each of several budgets; name the directory of one of them"),
    (lambda place: place, "holds no finished output of moe-rco prune; `moe-rco status"),
    (lambda place: place / "nowhere", "holds no finished output of moe-rco prune"),
)


@pytest.mark.parametrize(("arrange", "told"), UNFINISHED)
def test_only_one_finished_model_is_published(
    tmp_path: Path, arrange: Callable[[Path], Path], told: str
) -> None:
    assert told in refused(moe_rco("push", arrange(tmp_path), REPO))


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    with starting("moe_rco.publishing") as begin:
        yield begin


def test_interrupted_while_it_sends_it_ends_at_once(
    hub: Hub, output: Path, start: Start, tmp_path: Path
) -> None:
    hub.objects.clear()
    hub.arrived.clear()
    hub.held.set()
    run = start(output.absolute().parent, "out", "you/other", command="push", log=tmp_path / "log",
                before=partial(hubs.use, hub.url, tmp_path))  # fmt: skip
    assert hub.arrived.wait(100), run.log
    run.send(signal.SIGINT)
    assert run.ends() == 130, run.log
    assert run.log.splitlines()[-1] == "interrupted; `moe-rco push out you/other` goes on"
    hub.held.clear()
    hub.released.set()
    assert moe_rco("push", output, "you/other").exit_code == 0
    assert "README.md" in hub.files("you/other")
