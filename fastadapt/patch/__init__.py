# SPDX-License-Identifier: Apache-2.0
"""Doors into models of other libraries: transformers in place, models that PEFT wrapped, Trainer."""
