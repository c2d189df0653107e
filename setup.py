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
        if self.compiler.compiler_type != "unix":
            without_native(f"needs GCC or Clang, found {self.compiler.compiler_type!r}")
            return
        try:
            super().build_extension(ext)
        except Exception as error:  # optional: a compiler fails in as many ways as there are
            without_native(f"did not compile ({error})")


def without_native(reason: str) -> None:
    sys.stderr.write(f"fastadapt: the native extension {reason}; installing without it\n")


def native_extension(torch: Path) -> Extension:
    return Extension(
        "fastadapt._C",
        sources=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.h")),
        include_dirs=[str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
        # No fma where two roundings are written: the bits are those of bitsandbytes
        extra_compile_args=["-O3", "-g0", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden"],
        language="c++",
        optional=True,
    )


packages = find_packages(include=["fastadapt", "fastadapt.*"])
package_dir = {}
if (ROOT / "kernels" / "fused").is_dir():
    packages.append("fastadapt.kernels")
    package_dir["fastadapt.kernels"] = "kernels/fused"

torch_folder = find_torch()
if torch_folder is None:
    without_native("needs torch 2.10 or newer to be installed first, for its headers")

setup(
    packages=packages,
    package_dir=package_dir,
    ext_modules=[native_extension(torch_folder)] if torch_folder else [],
    cmdclass={"build_ext": BuildPlainLibrary},
)
