# SPDX-License-Identifier: Apache-2.0
"""Doors into other libraries: transformers models in place, models that PEFT wrapped, Trainer."""
