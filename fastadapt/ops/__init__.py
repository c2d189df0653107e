# SPDX-License-Identifier: Apache-2.0
"""Operator contracts: schema, reference, autograd Function and public function, one file an op."""
