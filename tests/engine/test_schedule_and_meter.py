import argparse

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmde_dist.engine import meter
from hmde_dist.engine.schedule import learning_rate
from hmde_dist.recipe import OptimizerSection


@given(st.integers(0, 50), st.integers(51, 500), st.sampled_from(["linear", "constant"]))
def test_the_rate_rises_to_its_peak_once_and_never_reaches_zero_before_the_end(warmup, steps, schedule):
    settings = OptimizerSection(learning_rate=0.5, warmup_steps=warmup, schedule=schedule)
    rates = [learning_rate(settings, step, steps) for step in range(steps)]
    assert max(rates) == pytest.approx(0.5)
    assert min(rates) > 0
    peak = rates.index(max(rates))
    assert peak <= warmup
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert (rates[-1] < rates[peak]) == (schedule == "linear" and peak < steps - 1)


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("Tesla T4", None)]
)
def test_an_unknown_device_has_no_peak_rather_than_a_wrong_one(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert meter.peak_flops(torch.device("cuda", 0)) == peak
    assert meter.peak_flops(torch.device("cpu")) is None


def test_flops_count_matrices_and_not_embeddings():
    module = torch.nn.Module()
    module.lower = torch.nn.ModuleList([torch.nn.Embedding(1000, 8), torch.nn.Linear(8, 16)])
    module.upper = torch.nn.Linear(8, 8)

    chunks = [
        argparse.Namespace(tokens=60, upper_rows=range(4), vectors=None),
        argparse.Namespace(tokens=40, upper_rows=range(6), vectors=None),
    ]
    batch = argparse.Namespace(chunks=chunks)
    assert meter.model_flops(module, batch) == 6 * (8 * 16 * 100 + 8 * 8 * 10)
    # Sentence vectors that are known already cost the sentence encoder nothing.
    chunks[1].vectors = torch.zeros(5, 8)
    assert meter.model_flops(module, batch) == 6 * (8 * 16 * 60 + 8 * 8 * 10)


def test_rates_are_sums_over_ranks_and_fractions_stay_fractions(monkeypatch):
    clock = iter([0.0, 4.0, 4.0])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(clock))

    class Batch:
        documents, tokens, imbalance = 2, 90, 0.5

    reading = meter.Meter(torch.device("cpu"))
    reading.count(Batch, 1.0, slots=100)
    reading.waiting(1.0)
    read = reading.read(lambda value: 2 * value)
    assert read["documents_per_second"] == 1.0
    assert read["tokens_per_second"] == 45.0
    assert read["padding_fraction"] == pytest.approx(0.1)
    assert read["token_imbalance"] == pytest.approx(0.5)
    assert read["data_wait_fraction"] == 0.25
    assert "mfu" not in read


def test_mfu_is_flops_over_seconds_and_peak(monkeypatch):
    """An H100 (989 TFLOP/s) that did 2 steps of 989 TFLOP in 8 seconds was used by a quarter."""
    clock = iter([0.0, 8.0, 8.0])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    reading = meter.Meter(torch.device("cuda", 0))
    batch = argparse.Namespace(documents=1, tokens=1, imbalance=0.0)
    for _ in range(2):
        reading.count(batch, 989e12, slots=1)
    assert reading.read(lambda value: value)["mfu"] == pytest.approx(0.25)
