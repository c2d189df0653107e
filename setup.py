# SPDX-License-Identifier: Apache-2.0
"""The package folders and the optional extension; everything else is in pyproject.toml.

``fastadapt._C`` is a plain shared library against libtorch's stable ABI: no Python headers, and
one build for every Python and every torch from 2.10 on. Without a compiler or torch's headers the
install says so in one line and goes on without it.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
STABLE_ABI = "0x020a000000000000"  # torch 2.10, the first with parallel_for


def find_torch() -> Path | None:
    """torch's folder, not imported: an isolated build cannot, but may read its headers."""
    spec = importlib.util.find_spec("torch")
    folders = [*(spec.submodule_search_locations or [] if spec else [])]
    folders += [f"{sysconfig.get_paths()[key]}/torch" for key in ("purelib", "platlib")]
    header = "include/torch/csrc/stable/ops.h"
    return next((path for path in map(Path, folders) if (path / header).is_file()), None)


class BuildPlainLibrary(build_ext):
    """Builds fastadapt/_C.so, whatever the Python, and never fails the install."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            without_native("needs torch 2.10 or newer to be installed first, for its headers")
        elif self.compiler.compiler_type != "unix":
            without_native(f"needs GCC or Clang, found {self.compiler.compiler_type!r}")
        else:
            ext.include_dirs.append(str(torch / "include"))
            ext.library_dirs.append(str(torch / "lib"))
            try:
                super().build_extension(ext)
            except Exception as error:  # a compiler is missing or fails in many ways
                without_native(f"did not compile ({str(error)[:80]} ...)")


def without_native(reason: str) -> None:
    sys.stderr.write(f"fastadapt: the native extension {reason}; installing without it\n")


native = Extension(
    "fastadapt._C",
    sources=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp")),
    depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.h")),
    libraries=["torch_cpu"],
    define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
    # No fma where two roundings are written: the bits are those of bitsandbytes
    extra_compile_args=["-O3", "-g0", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden"],
    language="c++",
    optional=True,  # setuptools then accepts that there is no file
)
packages = find_packages(include=["fastadapt", "fastadapt.*"])
package_dir = {}
if (ROOT / "kernels" / "fused").is_dir():
    packages.append("fastadapt.kernels")
    package_dir["fastadapt.kernels"] = "kernels/fused"

setup(
    packages=packages,
    package_dir=package_dir,
    ext_modules=[native],
    cmdclass={"build_ext": BuildPlainLibrary},
)
