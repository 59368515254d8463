"""Tests of moe_rco.optim."""
