"""What a compiler gets in place of an operation: its numbers, to two in ten million."""

import pytest
import torch
import torch.nn.functional as F

from pyro_vae.inference import rewrites
from pyro_vae.inference.capture import Capture

aten = torch.ops.aten
SIZES = torch.cat([torch.logspace(-38, 38, 40_001), torch.linspace(0.499, 0.501, 4_001), torch.linspace(0, 12, 9_001)])
BOTH = torch.cat([SIZES, -SIZES])
ENDS = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan, -1.0, -2.0])


@pytest.mark.parametrize(
    "quick, plain, x",
    [
        (rewrites.tanh_by_exp, torch.tanh, BOTH),
        (rewrites.expm1_by_exp, torch.expm1, BOTH[BOTH < 88]),
        (rewrites.log1p_by_log, torch.log1p, torch.cat([SIZES, -torch.logspace(-38, -1e-7, 40_001)])),
    ],
)
def test_a_formula_is_its_operation_to_two_in_ten_million(quick, plain, x):
    """Over all of float32: near zero, where two forms meet, where the result is an end, and what is no number."""
    wanted, found = plain(x.double()), quick(x)
    assert found.dtype == torch.float32
    assert ((found.double() - wanted).abs() <= 2e-7 * wanted.abs()).all()
    torch.testing.assert_close(quick(ENDS), plain(ENDS), rtol=2e-7, atol=0, equal_nan=True)


def test_the_quick_tanh_keeps_the_sign_of_zero_and_stays_within_one():
    assert rewrites.tanh_by_exp(torch.tensor([0.0, -0.0])).signbit().tolist() == [False, True]
    assert rewrites.tanh_by_exp(BOTH).abs().max() == 1


def test_other_types_are_left_to_the_compiler():
    for quick in rewrites.QUICK.values():
        assert quick(torch.ones(2, dtype=torch.float64)) is NotImplemented
        assert quick(torch.ones(2, dtype=torch.bfloat16)) is NotImplemented
        assert quick(torch.ones(2, device="meta")) is NotImplemented


@pytest.mark.parametrize(
    "operation, made_of",
    [
        (torch.tanh, ["tanh"]),
        (torch.expm1, ["expm1"]),
        (torch.log1p, ["log1p"]),
        (F.softplus, ["log1p"]),
        (F.logsigmoid, ["log1p"]),
        (F.elu, ["expm1"]),
        (F.mish, ["log1p", "tanh"]),
        (lambda x: F.gelu(x, approximate="tanh"), ["tanh"]),
        (lambda x: F.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="none"), ["log1p"]),
    ],
)
def test_a_compiler_takes_an_operation_apart_by_them(operation, made_of, monkeypatch):
    """In float32, forwards and backwards; in float64 it has its own."""
    used = []
    for overload, quick in rewrites.QUICK.items():

        def noted(x, name=overload.overloadpacket.__name__, quick=quick):
            found = quick(x)
            if found is not NotImplemented:
                used.append(name)
            return found

        monkeypatch.setitem(rewrites.QUICK, overload, noted)
    weight = torch.linspace(-2, 2, 15).reshape(3, 5).requires_grad_()
    x = torch.linspace(-1, 1, 20).reshape(5, 4)

    def function(x):
        loss = operation(weight @ x).square().sum() + operation(weight.double() @ x.double()).sum().float()
        loss.backward()
        return [loss.detach()]

    capture = Capture(function, [x])
    before = capture([x])
    with torch.compiler.config.patch(force_disable_caches=True):
        capture.compile([x])
    assert sorted(set(used)) == made_of
    for one, two in zip(before, capture([x]), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
