# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, imported by name and only at first use; same file names as ``fastadapt.ops``."""
