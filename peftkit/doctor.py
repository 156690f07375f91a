"""What this machine can do: versions against those tested, devices, 4 bits, kernels, extras. What can be tried is tried, not looked up."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.requirements import Requirement

import peftkit
from peftkit import quant
from peftkit.amounts import human
from peftkit.kernels import cpu_bf16
from peftkit.model import best_dtype, load

State = Literal["ok", "note", "warning", "broken"]
EXTRAS = {
    "rouge_score": ("rouge of eval.metrics", 'pip install "peftkit[text]"'),
    "sacrebleu": ("bleu of eval.metrics", 'pip install "peftkit[text]"'),
    "optuna": ("bench: learning rates", 'pip install "peftkit[bench]"'),
    "submitit": ("bench run --launcher submitit", 'pip install "peftkit[slurm]"'),
    "lm_eval": ("eval --tasks", 'pip install "peftkit[harness]"'),
    "flash_attn": ("attention: flash_attention_2", "pip install flash-attn, on a machine with a GPU"),
}
"""module -> (what needs it, how to have it)"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    area: str
    name: str
    state: State
    """ok; note: worth knowing; warning: works otherwise than one may think, or is not tested; broken: peftkit cannot do its work."""
    told: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings, in the order in which they matter."""

    findings: list[Finding]

    @property
    def ok(self) -> bool:
        return not any(finding.state == "broken" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "findings": [asdict(finding) for finding in self.findings]}


def doctor() -> Diagnosis:
    """Looks at everything. What raises is broken, and the others are looked at all the same."""
    findings: list[Finding] = []
    for area, look in AREAS.items():
        try:
            findings += [Finding(area, *found) for found in look()]
        except Exception as error:  # whatever a library throws at its first use is the finding
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            findings.append(Finding(area, area, "broken", f"{type(error).__name__}: {reason}", "try it in Python, and install the library anew"))
    return Diagnosis(findings)


Found = tuple[str, State, str, str]


def _versions() -> Iterator[Found]:
    python = ".".join(map(str, sys.version_info[:3]))
    fits = sys.version_info >= (3, 11)
    yield "python", "ok" if fits else "broken", python, "" if fits else "peftkit needs Python 3.11 or newer"
    yield "peftkit", "ok", peftkit.__version__, ""
    for line in tested_ranges():
        wanted = Requirement(line)
        if "extra ==" in line or (wanted.marker is not None and not wanted.marker.evaluate()):
            continue
        try:
            here = version(wanted.name)
        except PackageNotFoundError:
            yield wanted.name, "broken", "not installed", f'pip install "{wanted.name}{wanted.specifier}"'
            continue
        if wanted.specifier.contains(here, prereleases=True):
            yield wanted.name, "ok", f"{here} (tested: {wanted.specifier})", ""
        else:
            yield wanted.name, "warning", f"{here} is outside what was tested, {wanted.specifier}", f'pip install "{wanted.name}{wanted.specifier}"'


def tested_ranges() -> list[str]:
    """The requirements of this peftkit: those of its checkout, else those of the installed package."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.exists():
        told = tomllib.loads(project.read_text()).get("project", {})
        if told.get("name") == "peftkit":
            return list(told["dependencies"])
    return requires("peftkit") or []


def _device() -> Iterator[Found]:
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            major, minor = torch.cuda.get_device_capability(i)
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            yield f"GPU {i}", "ok", f"{torch.cuda.get_device_name(i)}, {human(free)} of {human(total)} free, compute capability {major}.{minor}", ""
            remedy = "" if bf16 else "float32 is used: fp16 overflows in many models"
            yield f"GPU {i}: bfloat16", "ok" if bf16 else "warning", "native" if bf16 else "not native", remedy
    elif Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build for CPUs"
        yield "GPU", "warning", f"there seems to be one, and torch ({built}) does not see it", "check nvidia-smi, and install torch for its driver: pytorch.org"
    else:
        yield "GPU", "note", "none: all runs on the CPU", ""
    yield "CPU", "ok", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads", ""
    if memory := _memory():
        available, everything = memory
        few = available < 2**30
        yield "memory", "warning" if few else "ok", f"{human(available)} of {human(everything)} available", "less than 1 GiB is left" if few else ""
    left = shutil.disk_usage(".").free
    yield "disk, here", "warning" if left < 2**30 else "ok", f"{human(left)} free", "" if left >= 2**30 else "checkpoints may not fit"
    dtype = best_dtype()
    one = torch.randn(64, 64, device=_where(), dtype=dtype)
    finite = bool(torch.isfinite(one @ one).all())
    name = str(dtype).removeprefix("torch.")
    yield "dtype: auto", "ok" if finite else "broken", f"means {name} here; a product in it is {'finite' if finite else 'not finite'}", ""


def _where() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _memory() -> tuple[int, int] | None:
    """(available, all) bytes of main memory, within the limit of a container; None where the system does not say."""
    try:
        told = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
        free, total = int(told["MemAvailable"]) * 1024, int(told["MemTotal"]) * 1024
    except (OSError, KeyError):  # not Linux
        return None
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdecimal():
        total = min(total, int(limit.read_text()))
        free = max(min(free, total - int(used.read_text())), 0)
    return free, total


def _four_bits() -> Iterator[Found]:
    """The embedded model in 4 bits: loaded, evaluated, and read back, on the device that training would use."""
    model, _ = load("builtin:tiny", quantize="nf4")
    before = {name: quant.dequantize(module).clone() for name, module in quant.quantized_modules(model).items()}
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.arange(16, device=model.device)[None]).logits
    finite = bool(torch.isfinite(logits).all())
    yield "nf4", "ok" if finite and before else "broken", f"{len(before)} linears quantised and evaluated on {model.device.type}", ""
    same = all(torch.equal(quant.dequantize(module), before[name]) for name, module in quant.quantized_modules(model).items())
    if not same:
        yield "4-bit weights after evaluation", "broken", "they are others than before: merging and training on would go wrong", "report this with the versions"
    elif quant.repacks_on_cpu():
        told = "this CPU (AVX512-BF16) lets bitsandbytes rewrite 4-bit weights in place in evaluation; peftkit switches that off, and they stayed the same"
        yield "4-bit weights after evaluation", "note", told, "with transformers alone, call peftkit.quant.protect(model) before the first evaluation"
    else:
        yield "4-bit weights after evaluation", "ok", "the same bits", ""
    gpu = torch.cuda.is_available()
    yield "paged 8-bit AdamW", "ok" if gpu else "note", "there" if gpu else "needs a GPU: plain AdamW runs instead", ""


def _kernels() -> Iterator[Found]:
    if find_spec("triton") is None:
        yield "Triton", "note", "not installed: the kernels in plain torch run", 'pip install "triton>=3.7,<3.8" on Linux with a GPU'
    else:
        import triton  # its module knows its version, which several distributions bring

        use = "its kernels run on the GPU" if torch.cuda.is_available() else "without a GPU the kernels in plain torch run"
        yield "Triton", "ok" if torch.cuda.is_available() else "note", f"{triton.__version__}: {use}", ""
    try:
        cpu_bf16.load()
        yield "bf16 on the CPU", "ok", "kernels in C++, compiled for this machine and tried out", ""
    except cpu_bf16.UnavailableError as error:
        yield "bf16 on the CPU", "note", f"plain torch runs, where kernels in C++ would be faster: {error}", ""


def _extras() -> Iterator[Found]:
    for module, (use, how) in EXTRAS.items():
        there = find_spec(module) is not None
        yield module, "ok" if there else "note", f"{'there' if there else 'not installed'}, for {use}", "" if there else how
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    yield "Hugging Face hub", "note", "HF_HUB_OFFLINE is set: only what is on this machine is found" if offline else "used for names that are no folders", ""


AREAS: dict[str, Callable[[], Iterator[Found]]] = {
    "versions": _versions, "device": _device, "4 bits": _four_bits, "kernels": _kernels, "extras": _extras,
}  # fmt: skip
