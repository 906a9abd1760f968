"""The stand-ins for SGLang's kernels: what they do, and that what they lack raises with its name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

STAND_INS = Path(__file__).resolve().parents[2] / "catalog" / "stand_ins"


def run(name: str, code: str) -> str:
    """Run code where one stand-in is installed, in a Python of its own: it must not stand in for anything here."""
    environ = {"PYTHONPATH": str(STAND_INS / name), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    return done.stdout + (done.stderr.strip().splitlines() or [""])[-1]


def refused(by: str, what: str) -> str:
    """The last line of what a stand-in raises: it says by name what it lacks, rather than to give a wrong number."""
    return f"NotImplementedError: {by} is a stand-in here; {what}"  # expected of them: a test fails without it


TRITON = """
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime.jit import JITFunction
from triton.runtime.errors import OutOfResources
from triton.backends import backends
WIDTH = tl.constexpr(4)
@triton.autotune(configs=[triton.Config({"N": 8}, num_warps=4)], key=["n"])
@triton.jit
def kernel(x, n: tl.constexpr, dtype: tl.dtype = tl.float32):
    "adds"
@triton.jit(do_not_specialize=["n"])
def other(x, n): ...
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print(triton.cdiv(7, 2), triton.cdiv(8, 2), [*map(triton.next_power_of_2, (1, 5, 8))])", "4 4 [1, 8, 8]\n"),
        ("print(WIDTH.value, kernel.__name__, kernel.__doc__, kernel.fn.__name__)", "4 kernel adds kernel\n"),
        ("print(isinstance(kernel, JITFunction), issubclass(OutOfResources, Exception), backends)", "False False {}\n"),
        ("print(tl.dtype is tl.dtype, libdevice is triton.language.extra.libdevice)", "True True\n"),
        ("kernel[(1,)](1, 2)", refused("Triton", "the kernel kernel cannot be launched")),
        ("other(1, 2)", refused("Triton", "the kernel other cannot be launched")),
        ("tl.load(1)", refused("Triton", "triton.language.load cannot be called")),
        ("triton.testing.do_bench(1, 2)", refused("Triton", "triton.testing.do_bench cannot be called")),
    ],
)  # fmt: skip
def test_triton(code: str, said: str) -> None:
    assert run("sglang_cpu_triton", TRITON + code) == said


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sgl_kernel; from sgl_kernel import silu_and_mul; print(sgl_kernel.__version__)", "0.4.10\n"),
        ("from sgl_kernel import silu_and_mul; silu_and_mul(1, out=2)",
         refused("sgl_kernel", "it has no silu_and_mul")),
        ("import sgl_kernel.flash_attn", "ModuleNotFoundError: No module named 'sgl_kernel.flash_attn'"),
    ],
)  # fmt: skip
def test_kernels(code: str, said: str) -> None:
    assert run("sglang_cpu_kernels", code) == said


def test_rows_of_the_kv_cache_are_copied_as_they_were_before() -> None:
    code = """
import ctypes, sgl_kernel
class Numbers(list):
    def tolist(self): return list(self)
layers = [ctypes.create_string_buffer(b"aabbccdd", 8), ctypes.create_string_buffer(b"ABCD", 4)]
pointers = Numbers(map(ctypes.addressof, layers))
sgl_kernel.copy_all_layer_kv_cache_cpu(pointers, Numbers([2, 1]), Numbers([1, 2]), Numbers([0, 1]))
print([layer.raw.decode() for layer in layers])
"""
    assert run("sglang_cpu_kernels", code) == "['aaaabbdd', 'AABD']\n"


def test_torchvisions_operators_are_declared_when_it_is_imported_and_not_before(tmp_path: Path) -> None:
    (tmp_path / "torch/library").mkdir(parents=True)
    (tmp_path / "torch/__init__.py").write_text("from . import library\nprint('torch')\n")
    (tmp_path / "torch/library/__init__.py").write_text(
        "class Library:\n"
        "    def __init__(self, *name): print(*name)\n"
        "    def define(self, schema): print(schema.split('(')[0])\n"
        "    def __del__(self): print('gone')\n"
    )
    (tmp_path / "torchvision.py").write_text("print('torchvision')\n")
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import sglang_cpu_torchvision, gc
print("started")
import torchvision
gc.collect(); print("end"); sys.stdout.flush()
import os; os._exit(0)
"""
    wanted = ["started", "torch", "torchvision DEF", "nms", "qnms", "torchvision", "end"]
    assert run("sglang_cpu_torchvision", code).splitlines() == wanted


def test_every_python_reads_torchvisions_stand_in_and_nothing_else() -> None:
    assert (
        STAND_INS / "sglang_cpu_torchvision/sglang_cpu_torchvision.pth"
    ).read_text() == "import sglang_cpu_torchvision\n"
    assert [path.parent.name for path in STAND_INS.rglob("*.pth")] == ["sglang_cpu_torchvision"]
