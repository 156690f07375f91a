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
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

ENABLED = True
"""Whether these kernels are used at all."""
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-fPIC", "-shared", "-fopenmp")
FEWEST_ROWS = 32
"""Below it the factors, which are packed in every call, are larger than what they are multiplied with."""
_ROWS_OF_A_THREAD = 64
_SUMS = 2**27
"""Most bytes for what threads sum apart: fewer of them work where it would be more."""


class UnavailableError(RuntimeError):
    """Why the kernels cannot run here."""


# -------------------------------------------------------------------------------------------------------- when they serve


def serves(x: Tensor, a: Sequence[Tensor] = (), b: Tensor | None = None, h: Tensor | None = None, magnitude: Tensor | None = None) -> bool:
    """Whether the kernels take x (tokens, width) with every A (r, width) or B (width, r), the h (tokens, sum of r) of all, and m (width,).

    What does not fit together is left to plain torch, which says so.
    """
    if not (x.dtype == torch.bfloat16 and x.is_cpu and memory_is_ours(x)):
        return False
    rows, width = x.shape
    if rows < FEWEST_ROWS or width % 32:
        return False
    r = 0
    for factor in a:
        if not _is_master(factor) or factor.shape[1] != width:
            return False
        r += factor.shape[0]
    if b is not None:
        if not _is_master(b) or b.shape[0] != width:
            return False
        r = b.shape[1]
    if magnitude is not None and not (_is_master(magnitude) and magnitude.shape == (width,)):
        return False
    return h is None or (h.dtype == torch.bfloat16 and h.is_cpu and h.shape == (rows, r))


def _is_master(factor: Tensor) -> bool:
    return factor.dtype == torch.float32 and factor.is_cpu and type(factor) in (nn.Parameter, Tensor)


def memory_is_ours(x: Tensor) -> bool:
    """Whether the kernels are there, and reading x past torch goes unnoticed.

    Transforms, tracing, fake tensors and modes such as FlopCounterMode must see every product: under them plain torch computes it.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or not ENABLED:
        return False
    watched = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None
    return not watched and library() is not None


def draws(x: Tensor) -> bool:
    """Whether dropout of x is a `dropout_mask`. It depends on nothing that may differ between a forward and its recomputation."""
    return x.dtype == torch.bfloat16 and x.is_cpu and x.numel() % 32 == 0 and type(x) is Tensor and ENABLED and library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, tried out; None where `load` cannot have them."""
    try:
        return load()
    except UnavailableError as error:
        logger.info("the kernels for bf16 on this CPU are not used (%s); plain torch computes the same, slower", error)
        return None


# ----------------------------------------------------------------------------------------------------------- how they come


def load() -> ctypes.CDLL:
    """Compiles `cpu_bf16.cpp` where that has not been done yet, and loads it. Raises UnavailableError, RuntimeError where it computes wrong."""
    if platform.system() != "Linux":
        raise UnavailableError("they need Linux")
    try:
        if "avx512_bf16" not in _cpu_flags():
            raise UnavailableError("they need a CPU with AVX512-BF16")
        found = _library(_compiler(), _openmp_of_torch())
    except (OSError, UnicodeError) as error:
        raise UnavailableError(f"{type(error).__name__}: {error}") from error
    _declare(found)
    _try_out(found)
    return found


def _cpu_flags() -> set[str]:
    text = Path("/proc/cpuinfo").read_text()
    return set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())


def _compiler() -> tuple[list[str], str]:
    """(command, what it says of its version) of the g++ that CXX names, or of g++ itself. Others bring an OpenMP of their own."""
    told = []
    for command in (shlex.split(os.environ.get("CXX", "")), ["g++"]):
        if command and shutil.which(command[0]):
            about = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
            if "Free Software Foundation" in about:
                return command, about
            told.append(f"{shlex.join(command)} is not g++")
        elif command:
            told.append(f"there is no {command[0]}")
    raise UnavailableError(f"{', '.join(told)}; install g++")


def _openmp_of_torch() -> str:
    """The file of the libgomp that torch runs on: with another copy there would be two pools of threads, each in the other's way."""
    with open("/proc/self/maps", errors="surrogateescape") as maps:
        files = {line.rstrip("\n").split(maxsplit=5)[5] for line in maps if line.count("/")}
    found = sorted(path for path in files if re.match(r"lib(g|i)?omp\d*[-.]", Path(path).name))
    gomp = [path for path in found if Path(path).name.startswith("libgomp")]
    home = Path(torch.__file__).parent
    own = [path for path in gomp if Path(path).parent in (home / "lib", home.parent / "torch.libs")] or (gomp if gomp == found else [])
    if len(own) != 1 or not Path(own[0]).exists():
        raise UnavailableError(f"torch's OpenMP is not one libgomp here ({', '.join(found) or 'none'})")
    return own[0]


def _library(compiler: tuple[list[str], str], openmp: str) -> ctypes.CDLL:
    """The library from the user's cache, compiled where it is not there."""
    command, about = compiler
    parts = [SOURCE.read_bytes(), *(text.encode(errors="surrogateescape") for text in (" ".join(FLAGS), " ".join(command), about, openmp))]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    try:
        folder = _cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _refuse_others(folder)
        whole = (path for path in sorted(folder.glob(f"{key}-*.so")) if path.stem == f"{key}-{_digest(path)}")
        path = next(whole, None) or _compiled(command, openmp, folder, key)
        _refuse_others(path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        logger.warning("%s: %s; the kernels are compiled into a temporary folder, which takes a second in each process", type(error).__name__, error)
        with tempfile.TemporaryDirectory() as name:
            return ctypes.CDLL(str(_compiled(command, openmp, Path(name), key)))


def _cache_folder() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        return home.expanduser() / "peftkit" / "kernels"
    except RuntimeError as error:
        raise OSError("this user has no home directory") from error


def _refuse_others(path: Path) -> None:
    """Raises OSError where somebody else could have put code there."""
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others may write to {path}")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _compiled(command: list[str], openmp: str, folder: Path, key: str) -> Path:
    """The library, put into `folder` in one step, since another process may be at it too. Raises UnavailableError with the compiler's first error.

    Its name holds a digest of it: loading one that was cut off would kill the process.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        result = Path(name) / "library.so"
        # torch's own libgomp is named first, so that the compiler's is not needed.
        done = subprocess.run([*command, *FLAGS, str(SOURCE), "-o", str(result), "-Wl,--as-needed", openmp], capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines()
            what = next((line for line in lines if "error" in line), lines[-1] if lines else f"exit status {done.returncode}")
            raise UnavailableError(f"{shlex.join(command)} fails: {what}")
        result.chmod(0o700)
        path = folder / f"{key}-{_digest(result)}.so"
        os.replace(result, path)
    return path


def _declare(found: ctypes.CDLL) -> None:
    pointer, integer, number, count = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    found.draw.argtypes = [pointer, integer, ctypes.c_uint64, ctypes.c_uint32, count]
    found.drop_all.argtypes = [pointer, pointer, pointer, integer, count]
    found.down.argtypes = [*[pointer] * 4, integer, integer, integer, number, count]
    found.update.argtypes = [pointer, pointer, integer, pointer, pointer, integer, integer, integer, number, count]
    found.output_backward.argtypes = [*[pointer] * 7, integer, *[pointer] * 3, integer, integer, integer, number, number, count]
    found.input_backward.argtypes = [*[pointer] * 6, integer, integer, integer, number, count]
    found.norm.argtypes = [*[pointer] * 6, integer, integer, integer, number, count]
    found.fingerprint.argtypes = [pointer, integer]
    found.fingerprint.restype = ctypes.c_uint64
    for function in (found.draw, found.drop_all, found.down, found.update, found.output_backward, found.input_backward, found.norm):
        function.restype = None


def _try_out(found: ctypes.CDLL) -> None:
    """One product whose result is known, before any other is trusted."""
    x, h = torch.ones(1, 32, dtype=torch.bfloat16, device="cpu"), torch.empty(1, 2, dtype=torch.bfloat16, device="cpu")
    a = torch.arange(32.0, device="cpu").repeat(2, 1)
    found.down(x.data_ptr(), a.data_ptr(), h.data_ptr(), None, 1, 32, 2, 0.5, torch.get_num_threads())
    if h.tolist() != [[248.0, 248.0]]:
        raise RuntimeError(f"the kernels for bf16 compute 0.5 (0 + 1 + ... + 31) = {h.tolist()}; set peftkit.kernels.cpu_bf16.ENABLED = False and report this")


# ------------------------------------------------------------------------------------------------------------ the kernels


def _at(tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> int | None:
    """The address of a contiguous tensor, which is what the kernels take it for: C would read and write past anything smaller."""
    if tensor is None:
        return None
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_cpu or not tensor.is_contiguous():
        raise TypeError(f"a kernel for a contiguous {dtype} {shape} on the CPU was given {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}")
    return tensor.data_ptr()


def _kernels() -> ctypes.CDLL:
    found = library()
    assert found is not None  # `serves` or `draws` was asked before
    return found


def _threads(rows: int, apart: int) -> int:
    """How many threads work where each sums `apart` numbers of its own."""
    return max(1, min(torch.get_num_threads(), -(-rows // _ROWS_OF_A_THREAD), _SUMS // (4 * apart)))


_BF16, _FP32, _BITS = torch.bfloat16, torch.float32, torch.uint8


def dropout_mask(count: int, p: float, seed: int) -> Tensor:
    """A bit for each of `count` numbers, a multiple of 32, as uint8 (count / 8,): 0, with probability p, where one is dropped. The seed alone decides."""
    mask = torch.empty(count // 8, dtype=_BITS, device="cpu")
    _kernels().draw(_at(mask, _BITS, count // 8), count // 32, seed, min(round(p * 2**32), 2**32 - 1), torch.get_num_threads())
    return mask


def zeros_of(mask: Tensor) -> Tensor:
    """The places of the zeros in a `dropout_mask`, in ascending order, for plain torch."""
    return (mask[:, None] >> torch.arange(8, dtype=_BITS, device=mask.device)).bitwise_and_(1).view(-1).logical_not().nonzero().view(-1)


def dropped(x: Tensor, mask: Tensor, out: Tensor | None = None) -> Tensor:
    """A contiguous x in bf16 with zeros where the `dropout_mask` has them, in `out`, which may be x, or in a new tensor."""
    out = torch.empty_like(x) if out is None else out
    _kernels().drop_all(_at(x, _BF16, *x.shape), _at(mask, _BITS, x.numel() // 8), _at(out, _BF16, *x.shape), x.numel() // 32, torch.get_num_threads())
    return out


def down(x: Tensor, a: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """scale d(x) A^T (tokens, r) for x (tokens, in) and A (r, in); d is that of the `dropout_mask`."""
    x, a = x.contiguous(), a.detach().contiguous()
    (m, k), r = x.shape, a.shape[0]
    h = x.new_empty(m, r)
    bits = _at(mask, _BITS, m * k // 8)
    _kernels().down(_at(x, _BF16, m, k), _at(a, _FP32, r, k), h.data_ptr(), bits, m, k, r, scale, torch.get_num_threads())
    return h


def update_(y: Tensor, h: Tensor, b: Tensor, scale: float, gain: Tensor | None = None) -> Tensor:
    """y <- gain * (y + scale h B^T), in place, for a contiguous y (tokens, out), h (tokens, r), B (out, r) and gain (out,)."""
    b, gain = b.detach().contiguous(), None if gain is None else gain.contiguous()
    (m, n), r = y.shape, h.shape[1]
    at, stride = _at_rows(h, m)
    _kernels().update(_at(y, _BF16, m, n), at, stride, _at(b, _FP32, n, r), _at(gain, _FP32, n), m, n, r, scale, torch.get_num_threads())
    return y


def _at_rows(h: Tensor, rows: int) -> tuple[int, int]:
    """Address and stride of h (tokens, r), which may be columns of a wider product."""
    if h.dtype != _BF16 or h.shape[0] != rows or not h.is_cpu or h.stride(1) != 1:
        raise TypeError(f"a kernel for {rows} rows of bf16 on the CPU was given {h.dtype} {tuple(h.shape)} on {h.device}, stride {h.stride()}")
    return h.data_ptr(), h.stride(0)


def output_backward(
    grad: Tensor, h: Tensor, b: Tensor, scale: float, scale_h: float, *, need_h: bool, need_b: bool,
    y: Tensor | None = None, magnitude: Tensor | None = None, gain: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(G', dh, dB, dm) from G = dL/dy (tokens, out): dh = scale_h G' B and dB = scale G'^T h, each if needed.

    G' is gain * G where there is a gain, G else. dm = sum_t G y / m, for DoRA's output y, is taken where there is a y. dB and dm are fp32.
    """
    assert y is None or not (magnitude is None or gain is None)
    grad, b = grad.contiguous(), b.detach().contiguous()
    y, magnitude, gain = (None if tensor is None else tensor.detach().contiguous() for tensor in (y, magnitude, gain))
    (m, n), r = grad.shape, h.shape[1]
    at, stride = _at_rows(h, m)
    scaled = grad if gain is None else torch.empty_like(grad)
    grad_h = grad.new_empty(m, r) if need_h else None
    grad_b = torch.empty_like(b) if need_b else None
    grad_m = None if y is None else b.new_empty(n)
    made = [None if tensor is None else tensor.data_ptr() for tensor in (scaled, grad_m, grad_h, grad_b)]
    _kernels().output_backward(
        _at(grad, _BF16, m, n), _at(y, _BF16, m, n), _at(magnitude, _FP32, n), _at(gain, _FP32, n), *made[:2],
        at, stride, _at(b, _FP32, n, r), *made[2:], m, n, r, scale, scale_h, _threads(m, n * (r + 16)),
    )  # fmt: skip
    return scaled, grad_h, grad_b, grad_m


def input_backward(x: Tensor, grad_h: Tensor, a: Tensor, mask: Tensor | None, grad_x: Tensor | None, scale: float, *, need_a: bool) -> Tensor | None:
    """dA = scale dh^T d(x) (r, in) in fp32, if needed; a contiguous dx (tokens, in) <- dx + scale d(dh A), in place, if there is one."""
    x, grad_h, a = x.contiguous(), grad_h.contiguous(), a.detach().contiguous()
    (m, k), r = x.shape, a.shape[0]
    grad_a = torch.empty_like(a) if need_a else None
    _kernels().input_backward(
        _at(x, _BF16, m, k), _at(grad_h, _BF16, m, r), _at(a, _FP32, r, k), _at(grad_x, _BF16, m, k), _at(grad_a, _FP32, r, k),
        _at(mask, _BITS, m * k // 8), m, k, r, scale, _threads(m, k * (r + 15)),
    )  # fmt: skip
    return grad_a


def norm(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """|W + s B A| by row (out,) in fp32, for a contiguous W (out, in) in bf16 and |W|^2 by row; with an m, m / |W + s B A| and 1 where the norm is 0.

    out is a multiple of 8.
    """
    a, b, squares = a.detach().contiguous(), b.detach().contiguous(), squares.float().contiguous()
    magnitude = None if magnitude is None else magnitude.detach().contiguous()
    (n, k), r = weight.shape, a.shape[0]
    found = torch.empty(n, dtype=_FP32, device="cpu")
    _kernels().norm(
        _at(weight, _BF16, n, k), _at(squares, _FP32, n), _at(a, _FP32, r, k), _at(b, _FP32, n, r), _at(magnitude, _FP32, n), found.data_ptr(),
        n, k, r, scale, torch.get_num_threads(),
    )  # fmt: skip
    return found


def fingerprint(tensor: Tensor) -> int:
    """A number for the exact bits of a contiguous tensor: a change of one number always shows, another with all but certainty."""
    return _kernels().fingerprint(_at(tensor, tensor.dtype, *tensor.shape), tensor.nbytes)
