"""The low-rank products in bf16 on CPUs with AVX512-BF16, in C++: each pass over x, y or G does all that pass is wanted for.

`cpu_bf16.cpp` is compiled by g++ at the first use on a machine, which takes a second or two, and kept in the user's cache.
Where the CPU, the compiler or torch's OpenMP is another one, `serves` is False and the callers take plain torch, whose
products are the same up to the order of sums.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

ENABLED = True
"""Whether these kernels are used at all."""
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-fPIC", "-shared", "-fopenmp")
FEWEST_ROWS = 32
"""Below it the factors, which are packed in every call, are larger than what they are multiplied with."""
_SUMS = 2**25
"""Most bytes for what the threads sum apart."""


class UnavailableError(RuntimeError):
    """Why the kernels cannot run here."""


# -------------------------------------------------------------------------------------------------------- when they serve


def serves(x: Tensor, r: int, beside: int, masters: torch.dtype) -> bool:
    """Whether the kernels take x (tokens, width) with factors of rank r in the dtype `masters`, whose other side is `beside` wide.

    They do not see what watches or replaces calls of torch, such as fake tensors, FlopCounterMode and torch.jit.trace: plain torch does.
    """
    if not (x.dtype == torch.bfloat16 and masters == torch.float32 and x.is_cpu and sees(x)):
        return False
    rows, width = x.shape
    sums = max(width, beside) * (r + 15) * 4 * torch.get_num_threads()
    return rows >= FEWEST_ROWS and width % 32 == beside % 32 == 0 and sums <= _SUMS


def sees(x: Tensor) -> bool:
    """Whether the kernels are there and x is memory that they can read."""
    return ENABLED and type(x) is Tensor and not torch._C._len_torch_dispatch_stack() and torch._C._get_tracing_state() is None and library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, tried out; None where `load` cannot have them."""
    try:
        return load()
    except UnavailableError as error:
        logger.info("the kernels for bf16 on this CPU are not used (%s); plain torch computes the same, slower", error)
        return None


def load() -> ctypes.CDLL:
    """Compiles `cpu_bf16.cpp` where that has not been done yet, and loads it. Raises UnavailableError, RuntimeError where it computes wrong."""
    if platform.system() != "Linux" or "avx512_bf16" not in _cpu_flags():
        raise UnavailableError("they need Linux and a CPU with AVX512-BF16")
    openmp = _openmp_of_torch()
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise UnavailableError(f"no C++ compiler {os.environ.get('CXX') or 'g++'}; install g++")
    about = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    if "clang" in about:
        raise UnavailableError(f"{compiler} is clang, whose OpenMP is not torch's; set CXX to g++")
    source = SOURCE.read_bytes()
    key = hashlib.sha256(b"\0".join([source, " ".join(FLAGS).encode(), about.encode(), openmp.encode()])).hexdigest()[:16]
    try:
        folder = _cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        whole = (path for path in sorted(folder.glob(f"{key}-*.so")) if path.stem == f"{key}-{_digest(path)}")
        found = ctypes.CDLL(str(next(whole, None) or _compiled(compiler, openmp, folder, key)))
    except OSError as error:
        logger.warning("%s: %s; the kernels are compiled into a temporary folder, which takes a second in each process", type(error).__name__, error)
        with tempfile.TemporaryDirectory() as name:
            found = ctypes.CDLL(str(_compiled(compiler, openmp, Path(name), key)))
    _declare(found)
    _try_out(found)
    return found


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError as error:
        raise UnavailableError(f"/proc/cpuinfo cannot be read: {error}") from error
    return set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())


def _openmp_of_torch() -> str:
    """The file of the libgomp that torch runs on: with another copy there would be two pools of threads, each in the other's way."""
    with open("/proc/self/maps") as maps:
        found = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line or "libomp" in line}
    gomp = sorted(path for path in found if Path(path).name.startswith("libgomp"))
    own = [path for path in gomp if "torch" in Path(path).parts] or gomp
    if len(own) != 1 or len(gomp) < len(found):
        raise UnavailableError(f"torch's OpenMP is not one libgomp here ({', '.join(sorted(found)) or 'none'})")
    return own[0]


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "peftkit" / "kernels"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _compiled(compiler: str, openmp: str, folder: Path, key: str) -> Path:
    """The library, put into `folder` in one step, since another process may be at it too. Raises UnavailableError with the compiler's first error.

    Its name holds a digest of it: loading one that was cut off would kill the process.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        result = Path(name) / "library.so"
        # torch's own libgomp is named first, so that the compiler's is not needed.
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(result), "-Wl,--as-needed", openmp]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines()
            raise UnavailableError(f"{compiler} fails: {next((line for line in lines if 'error' in line), lines[-1] if lines else done.returncode)}")
        path = folder / f"{key}-{_digest(result)}.so"
        os.replace(result, path)
    return path


def _declare(found: ctypes.CDLL) -> None:
    pointer, integer, number, count = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    found.draw.argtypes = [pointer, integer, ctypes.c_uint64, ctypes.c_uint32, count]
    found.down.argtypes = [*[pointer] * 4, integer, integer, integer, number, count]
    found.update.argtypes = [pointer, pointer, integer, pointer, pointer, integer, integer, integer, number, count]
    found.output_backward.argtypes = [*[pointer] * 7, integer, *[pointer] * 3, integer, integer, integer, number, number, count]
    found.input_backward.argtypes = [*[pointer] * 6, integer, integer, integer, number, count]
    found.norm.argtypes = [*[pointer] * 6, integer, integer, integer, number, count]
    found.fingerprint.argtypes = [pointer, integer]
    found.fingerprint.restype = ctypes.c_uint64
    for function in (found.draw, found.down, found.update, found.output_backward, found.input_backward, found.norm):
        function.restype = None


def _try_out(found: ctypes.CDLL) -> None:
    """One product whose result is known, before any other is trusted."""
    x, a, h = torch.ones(1, 32, dtype=torch.bfloat16), torch.arange(32.0).expand(2, 32).contiguous(), torch.empty(1, 2, dtype=torch.bfloat16)
    found.down(x.data_ptr(), a.data_ptr(), h.data_ptr(), None, 1, 32, 2, 0.5, torch.get_num_threads())
    if h.tolist() != [[248.0, 248.0]]:
        raise RuntimeError(f"the kernels for bf16 compute 0.5 (0 + 1 + ... + 31) = {h.tolist()}; set peftkit.kernels.cpu_bf16.ENABLED = False and report this")


# ------------------------------------------------------------------------------------------------------------ the kernels


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _kernels() -> ctypes.CDLL:
    found = library()
    assert found is not None  # `serves` was asked before
    return found


def dropout_mask(count: int, p: float, seed: int) -> Tensor:
    """A bit for each of `count` numbers, a multiple of 32, as uint8 (count / 8,): 0, with probability p, where one is dropped. The seed alone decides."""
    kept = torch.empty(count // 8, dtype=torch.uint8)
    _kernels().draw(_at(kept), count // 32, seed, min(round(p * 2**32), 2**32 - 1), torch.get_num_threads())
    return kept


def zeros_of(kept: Tensor) -> Tensor:
    """The places of the zeros in a `dropout_mask`, in ascending order, for plain torch."""
    return (kept[:, None] >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).view(-1).logical_not().nonzero().view(-1)


def down(x: Tensor, a: Tensor, scale: float, kept: Tensor | None) -> Tensor:
    """scale d(x) A^T (tokens, r) for x (tokens, in) and A (r, in); d is that of the `dropout_mask`."""
    x, a = x.contiguous(), a.detach().contiguous()
    h = x.new_empty(x.shape[0], a.shape[0])
    _kernels().down(_at(x), _at(a), _at(h), _at(kept), *x.shape, a.shape[0], scale, torch.get_num_threads())
    return h


def update_(y: Tensor, h: Tensor, b: Tensor, scale: float, gain: Tensor | None = None) -> Tensor:
    """y <- gain * (y + scale h B^T), in place, for a contiguous y (tokens, out), h (tokens, r), B (out, r) and gain (out,)."""
    assert y.is_contiguous() and h.stride(1) == 1
    b, gain = b.detach().contiguous(), None if gain is None else gain.contiguous()
    _kernels().update(_at(y), _at(h), h.stride(0), _at(b), _at(gain), *y.shape, h.shape[1], scale, torch.get_num_threads())
    return y


def output_backward(
    grad: Tensor, h: Tensor, b: Tensor, scale: float, scale_h: float, *, need_h: bool, need_b: bool,
    y: Tensor | None = None, magnitude: Tensor | None = None, gain: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(G', dh, dB, dm) from G = dL/dy (tokens, out): dh = scale_h G' B and dB = scale G'^T h, each if needed.

    G' is gain * G where there is a gain, G else. dm = sum_t G y / m, for DoRA's output y, is taken where there is a y. dB and dm are fp32.
    """
    assert h.stride(1) == 1 and (y is None or not (magnitude is None or gain is None))
    grad, b = grad.contiguous(), b.detach().contiguous()
    y, magnitude, gain = (None if tensor is None else tensor.detach().contiguous() for tensor in (y, magnitude, gain))
    scaled = grad if gain is None else torch.empty_like(grad)
    grad_h = grad.new_empty(h.shape) if need_h else None
    grad_b = torch.empty_like(b) if need_b else None
    grad_m = None if y is None else b.new_empty(b.shape[0])
    _kernels().output_backward(
        _at(grad), _at(y), _at(magnitude), _at(gain), _at(scaled), _at(grad_m), _at(h), h.stride(0), _at(b), _at(grad_h), _at(grad_b),
        *grad.shape, h.shape[1], scale, scale_h, torch.get_num_threads(),
    )  # fmt: skip
    return scaled, grad_h, grad_b, grad_m


def input_backward(x: Tensor, grad_h: Tensor, a: Tensor, kept: Tensor | None, grad_x: Tensor | None, scale: float, *, need_a: bool) -> Tensor | None:
    """dA = scale dh^T d(x) (r, in) in fp32, if needed; a contiguous dx (tokens, in) <- dx + scale d(dh A), in place, if there is one."""
    assert grad_x is None or grad_x.is_contiguous()
    x, grad_h, a = x.contiguous(), grad_h.contiguous(), a.detach().contiguous()
    grad_a = torch.empty_like(a) if need_a else None
    _kernels().input_backward(_at(x), _at(grad_h), _at(a), _at(grad_x), _at(grad_a), _at(kept), *x.shape, a.shape[0], scale, torch.get_num_threads())
    return grad_a


def norm(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """|W + s B A| by row (out,) in fp32, for a contiguous W (out, in) in bf16 and |W|^2 by row; with an m, m / |W + s B A| and 1 where the norm is 0."""
    assert weight.is_contiguous()
    a, b, squares = a.detach().contiguous(), b.detach().contiguous(), squares.float().contiguous()
    magnitude = None if magnitude is None else magnitude.detach().float().contiguous()
    found = b.new_empty(b.shape[0])
    _kernels().norm(_at(weight), _at(squares), _at(a), _at(b), _at(magnitude), _at(found), *weight.shape, a.shape[0], scale, torch.get_num_threads())
    return found


def fingerprint(tensor: Tensor) -> int:
    """A number for the exact bits of a contiguous tensor: a change of one number always shows, another with all but certainty."""
    return _kernels().fingerprint(_at(tensor), tensor.nbytes)
