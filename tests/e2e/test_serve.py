"""`moe-rco serve` on an output of `moe-rco prune`: the real server, asked by the official client."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_rco.serve.hf import register
from tests.compressed import random_job
from tests.e2e.test_prune import QUICK, command, prune_command, run
from tests.tiny_models import save_tiny

pytest.importorskip("vllm", reason="vLLM is not installed")
openai = pytest.importorskip("openai")

QUESTION = "Question: What is 23 + 45?"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
SECONDS_TO_START = 280


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    address: str
    model: Path
    log: Path

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.address}{path}", timeout=30) as answer:
            assert answer.status == 200
            return answer.read().decode()

    def client(self) -> Any:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", timeout=120)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    model = folder / "demo"
    done = run(prune_command(model, *QUICK))
    assert done.returncode == 0, done.stderr
    (model / "chat_template.jinja").write_text(TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--served-model-name",
        "demo",
    )
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command("serve", str(model), *options), stdout=output, stderr=subprocess.STDOUT
        )
    found = Server(process, f"http://127.0.0.1:{port}", model, log)
    try:
        _wait(found)
        yield found
    finally:
        process.kill()
        process.wait()


def _wait(server: Server) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline:
        assert server.process.poll() is None, server.log.read_text()[-4000:]
        try:
            server.get("/health")
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    raise AssertionError(f"no answer after {SECONDS_TO_START} s: {server.log.read_text()[-4000:]}")


def greedy(model: Path, prompt: str, new: int) -> tuple[str, list[float]]:
    """transformers' text and the log-probability of each token of it."""
    register()
    reference: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = reference.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        log_p = torch.log_softmax(reference(out).logits[0].float(), -1)
    start = ids.shape[1]
    chosen = [float(log_p[at - 1, out[0, at]]) for at in range(start, out.shape[1])]
    return tokenizer.decode(out[0, start:]), chosen


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_says_what_it_takes_before_vllm_starts(server: Server) -> None:
    text = server.log.read_text()
    assert text.index("KV cache") < text.index("Started server process")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_completions_are_those_of_transformers_with_their_log_probabilities(server: Server) -> None:
    answer = server.client().completions.create(
        model="demo", prompt=QUESTION, max_tokens=20, temperature=0, logprobs=1
    )
    text, expected = greedy(server.model, QUESTION, 20)
    choice = answer.choices[0]
    assert choice.text == text
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_streaming_gives_the_same_text_in_pieces(server: Server) -> None:
    settings = {"model": "demo", "prompt": QUESTION, "max_tokens": 20, "temperature": 0}
    client = server.client()
    pieces = [part.choices[0].text for part in client.completions.create(**settings, stream=True)]
    assert len(pieces) > 5
    assert "".join(pieces) == client.completions.create(**settings).choices[0].text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_chat_goes_through_the_model_s_template(server: Server) -> None:
    answer = server.client().chat.completions.create(
        model="demo", messages=[{"role": "user", "content": QUESTION}], max_tokens=20, temperature=0
    )
    expected, _ = greedy(server.model, f"{QUESTION}\n", 20)
    assert answer.choices[0].message.content == expected


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_eight_clients_at_once_get_what_each_gets_alone(server: Server) -> None:
    prompts = [f"Question: What is {10 + 7 * n} + {31 + n}?" for n in range(8)]

    def ask(prompt: str) -> str:
        return (
            server.client()
            .completions.create(model="demo", prompt=prompt, max_tokens=24, temperature=0)
            .choices[0]
            .text
        )

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, prompts))
    assert together == alone
    assert len(set(alone)) > 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_metrics_count_the_requests(server: Server) -> None:
    def finished() -> float:
        lines = server.get("/metrics").splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:request_success_total"))

    before = finished()
    server.client().completions.create(model="demo", prompt="One", max_tokens=2)
    assert finished() == before + 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigterm_ends_it_cleanly(server: Server) -> None:
    """The last test: the server is gone after it, and its engine with it."""
    engines = psutil.Process(server.process.pid).children(recursive=True)
    assert engines
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert not psutil.wait_procs(engines, timeout=30)[1]
    with pytest.raises(urllib.error.URLError):
        server.get("/health")


def test_a_damaged_output_is_refused_before_vllm_starts(tmp_path: Path) -> None:
    job = random_job(save_tiny("mixtral", tmp_path / "model"), tmp_path / "store", seed=0)
    written = job.write(tmp_path / "out").directory
    index = written / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    shard = sorted(set(names["weight_map"].values()))[0]
    (written / shard).write_bytes((written / shard).read_bytes()[:-10])
    done = run(command("serve", str(written)))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert shard in done.stderr
