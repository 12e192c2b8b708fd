"""Tests of oomproof.evaluation."""
