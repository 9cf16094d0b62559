"""Every Triton kernel, compiled for sm_80 and sm_90 without a GPU: nothing spills, and wide accesses are 16 bytes wide.

Also what a launcher may not do. This file is its own compiler: `python tests/test_kernels_aot.py` prints what came out
as JSON (with `--table` to read). It runs in a process of its own, because one process either interprets or compiles.
"""

from __future__ import annotations

import ast
import bisect
import importlib
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from deqkern.ops import CONTRACTS
from deqkern.ops.contract import Float64, Int64, Output, State

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
ARCHITECTURES = (80, 90)
POINTERS = {State: "*fp32", Output: "*fp32", Float64: "*fp64", Int64: "*i64"}
# Of every argument of a kernel that is no int: those of the ops, and what their launchers add.
TYPES = {
    argument.name: next(kind for rule, kind in POINTERS.items() if isinstance(argument.rule, rule))
    for contract in CONTRACTS.values()
    for argument in contract.tensors
}
TYPES |= {a.name: "fp32" for contract in CONTRACTS.values() for a in contract.scalars if a.type is float}
TYPES |= dict.fromkeys(("source", "target", "matrix", "partial"), "*fp32")
ALIGNED = {"size", "plane", "height", "width", "length", "other"}  # integers divisible by 16 where a sample's sides are


sys.path.insert(0, str(ROOT / "tests" / "ops"))
CASES = [
    case for path in KERNELS if path.stem in CONTRACTS for case in importlib.import_module(f"test_{path.stem}").COMPILED
]


def compiled(case: Any, architecture: int) -> tuple[dict[str, Any], bytes]:
    """What the compiler says of a kernel, and its instructions."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    op = next(path.stem for path in KERNELS if case.kernel.startswith(path.stem))
    module = importlib.import_module(f"deqkern.kernels.{op}")
    kernel = getattr(module, case.kernel)
    types = {name: (TYPES | case.types).get(name, "i32") for name in kernel.arg_names}
    aligned = {name for name, kind in types.items() if kind[0] == "*" or (case.aligned and name in ALIGNED)}
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in case.constants else kind for name, kind in types.items()},
        constexprs=case.constants,
        attrs={
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if name in aligned - set(case.constants)
        },
    )
    options = {"num_warps": case.warps} | {name: getattr(module, value) for name, value in case.options.items()}
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    listing = printed(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file=binary.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing)
    assert found, listing[:1000]
    usage = {"registers": int(found[1]), "local": int(found[2]) + int(found[3]), "shared": binary.metadata.shared}
    return usage, instructions(binary.asm["cubin"], case.kernel)


def printed(*command: str, file: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as place:
        place.write(file)
        place.flush()
        return subprocess.run([*command, place.name], capture_output=True, text=True, check=True).stdout


def instructions(elf: bytes, kernel: str) -> bytes:
    """The section .text.<kernel> of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, table + size * i) for i in range(count)]
    name = f".text.{kernel}\0".encode()
    (found,) = (section for section in sections if elf.startswith(name, sections[names][4] + section[0]))
    return elf[found[4] :][: found[5]]


def disassembled(codes: list[bytes], architecture: int) -> list[str]:
    """A listing of each, all by one process: it takes a quarter of a second to start."""
    import triton

    target = {80: "SM80", 90: "SM90a"}[architecture]
    ends = list(itertools.accumulate(map(len, codes)))
    lines: list[list[str]] = [[] for _ in codes]
    for line in printed(triton.knobs.nvidia.nvdisasm.path, "-ndf", "-b", target, file=b"".join(codes)).splitlines():
        if address := re.match(r"\s*/\*([0-9a-f]+)\*/", line):
            lines[bisect.bisect_right(ends, int(address[1], 16))].append(line)
    assert all(len(listed) * 16 == len(code) for listed, code in zip(lines, codes, strict=True))
    return ["\n".join(listed) for listed in lines]


def outcome(architecture: int) -> list[dict[str, Any]]:
    usage, codes = zip(*(compiled(case, architecture) for case in CASES), strict=True)
    return [
        used
        | {
            "spills": len(re.findall(r"\b(?:LDL|STL)\b", listing)),
            "loads": len(re.findall(r"\b(?:LDG\.E|LDGSTS\.E)(?:\.\w+)*\.128\b", listing)),
            "stores": len(re.findall(r"\bSTG\.E(?:\.\w+)*\.128\b", listing)),
        }
        for used, listing in zip(usage, disassembled(list(codes), architecture), strict=True)
    ]


@pytest.fixture(scope="module", params=["installed", "other"])
def results(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """By the Triton that is installed, and by another version in the folder OTHER_TRITON."""
    paths, folder = list(sys.path), os.environ.get("OTHER_TRITON", "")
    if request.param == "installed":
        pytest.importorskip("triton")
    elif folder:
        paths.insert(0, folder)
    else:
        pytest.skip("no folder OTHER_TRITON; for one: pip install --no-deps --target FOLDER triton==3.6.0")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: f"{CASES[number].kernel}-{number}")
def test_nothing_spills_and_accesses_are_wide(results: dict[str, Any], number: int, architecture: int) -> None:
    case, result = CASES[number], results[f"{number}-{architecture}"]
    assert result["local"] == result["spills"] == 0, result
    assert result["loads"] >= case.loads and result["stores"] >= case.stores, result
    assert result["shared"] <= 48 * 1024, result


def test_launches_are_rounded_as_triton_does() -> None:
    triton, launch = pytest.importorskip("triton"), importlib.import_module("deqkern.kernels.launch")
    for n in range(1, 1100):
        assert launch.next_power_of_2(n) == triton.next_power_of_2(n)
        assert [launch.cdiv(n, block) for block in (1, 7, 256)] == [triton.cdiv(n, block) for block in (1, 7, 256)]


def kernel_names() -> list[str]:
    trees = [ast.parse(path.read_text()) for path in KERNELS]
    names = [node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [name for name in names if name.endswith("_kernel")]


def test_every_kernel_is_compiled_here() -> None:
    assert {case.kernel for case in CASES} == set(kernel_names())


SYNCHRONISES = {
    "item",
    "cpu",
    "tolist",
    "numpy",
    "nonzero",
    "unique",
    "masked_select",
    "synchronize",
    "bool",
    "any",
    "all",
}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_launchers_never_wait_for_the_device(path: Path) -> None:
    """No method that reads a tensor on the host, no number or truth value of a tensor, no branch on one."""
    for function in ast.parse(path.read_text()).body:
        if not isinstance(function, ast.FunctionDef) or function.name.endswith("_kernel"):
            continue
        arguments = {a.arg for a in function.args.args if a.annotation and "Tensor" in ast.unparse(a.annotation)}
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute):
                assert node.attr not in SYNCHRONISES, ast.unparse(node)
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("int", "float", "bool")
            ):
                raise AssertionError(ast.unparse(node))
            if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
                bare = [n for n in ast.walk(node.test) if isinstance(n, ast.Name) and n.id in arguments]
                allowed = isinstance(node.test, ast.Compare) and isinstance(node.test.ops[0], ast.Is | ast.IsNot)
                assert allowed or not bare, ast.unparse(node.test)


if __name__ == "__main__":
    outcomes = {f"{i}-{arch}": used for arch in ARCHITECTURES for i, used in enumerate(outcome(arch))}
    if "--table" in sys.argv:
        for key, result in outcomes.items():
            print(CASES[int(key.split("-")[0])].kernel, key, result)
    else:
        json.dump(outcomes, sys.stdout)
