# SPDX-License-Identifier: Apache-2.0
"""PEFT's module paths: ``fastadapt.tuners.lora.layer`` and its like, as names over our own code."""
